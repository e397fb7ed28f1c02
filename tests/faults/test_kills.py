"""`python -m tests.kills`: actors that are killed all along in one run, with real processes."""

import ast
import re
import time
from pathlib import Path

import pytest

from tests.kills.run import BATCH, PEACE
from tests.launched import launching

LINE = re.compile(r"(\d+) kills in \d+ s: (\d+) groups trained once each, dropped (\{.*?\}); sent again (\{.*?\}); .*")


@pytest.mark.parametrize("num_kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_every_group_is_trained_once_or_dropped(num_kills: int, tmp_path: Path) -> None:
    with launching(tmp_path) as launch:
        command = launch("--kills", str(num_kills), module="tests.kills")
        code = command.exit_code(400)
        assert code == 0, command.said()
        while command.left():  # the process that the actors were forked from ends when it finds itself alone
            time.sleep(0.05)
        last = LINE.fullmatch(command.stdout.splitlines()[-1])
    assert last is not None, command.said()
    killed, trained, dropped, again = map(ast.literal_eval, last.groups())
    assert (killed, trained) == (num_kills, (num_kills + PEACE) * BATCH)
    assert dropped.keys() <= {"REWARD_RAISED", "ATTEMPTS_EXHAUSTED"}
    assert again["UNREACHABLE"] >= num_kills / 2
