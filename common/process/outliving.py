"""A standard output whose reader may go away before this process: `outrider ... | head`, a terminal that is closed."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Outliving:
    """A text stream that never fails: what nobody can read is not written, and what has no code is escaped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_read = True

    def write(self, text: str) -> int:
        """Write, or not."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._try(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, call: Any, *arguments: str) -> None:
        if self._is_read:
            try:
                call(*arguments)
            except (OSError, ValueError):
                self._is_read = False


@contextlib.contextmanager
def outliving_output() -> Iterator[None]:
    """While the block runs, `print` never fails."""
    with contextlib.redirect_stdout(Outliving(sys.stdout)):
        yield
