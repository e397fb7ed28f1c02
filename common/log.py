"""Logs: structlog, pretty on a terminal and one JSON object per line otherwise."""

import logging
import sys
from typing import TextIO

import structlog


def configure(level: str = "info", stream: TextIO | None = None, **context: str) -> None:
    """Set up logging of this process to `stream` (standard error by default).

    `context` goes into every line, as `actor_id="a1b2"`. Raises ValueError for a level that does not exist.
    """
    stream = stream or sys.stderr
    levels = logging.getLevelNamesMapping()
    if level.upper() not in levels:
        raise ValueError(f"log level {level!r} does not exist; use debug, info, warning or error")
    pretty = stream.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            lambda _logger, _method, event: {**event, **context},
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if pretty else "iso", utc=not pretty),
            *([] if pretty else [structlog.processors.format_exc_info]),
            structlog.dev.ConsoleRenderer() if pretty else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(levels[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(stream),
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of one module; its lines carry `source=name`."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(source=name)
    return logger
