"""Rank 0's loop thread, from outside."""

import socket
from unittest.mock import MagicMock

import pytest

from common.config import ConfigError
from learner.config import LearnerConfig
from learner.control import Control
from learner.ledger import Ledger
from tests.fakes import Rows


def test_a_start_that_fails_can_be_closed() -> None:
    """The error stays the one line about the port, and no reward process is left."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        config = LearnerConfig.model_validate(
            {
                "model": {"path": "m"},
                "data": {"train": "t"},
                "trainer": {"total_steps": 1, "batch_prompts": 1},
                "rollout": {"actors": ["127.0.0.1:1"]},
                "metrics_listen": listen,
            }
        )
        processor = MagicMock()
        control = Control(
            config,
            backend="gloo",
            train=Rows(3),  # type: ignore[arg-type]
            held_out=None,
            processor=processor,
            ledger=Ledger(0, 3),
            version=0,
            on_actor_event=print,
        )
        with pytest.raises(ConfigError, match="metrics_listen"):
            control.start()
        control.close()
        assert control._loop.is_closed()
