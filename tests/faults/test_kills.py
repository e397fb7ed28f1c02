"""`python -m tests.kills`: actors that are killed all along in one run, with real processes."""

import ast
import re
import time
from pathlib import Path

import pytest

from tests.helpers.launched import launching
from tests.kills.actors import Actor, ActorEnded
from tests.kills.run import Load
from tests.kills.runs import PEACE

LINE = re.compile(
    r"(\d+) of \d+ kills in \d+ s: (\d+) groups trained once each, dropped (\{.*?\}); sent again (\{.*?\}); .*"
)
NUM_KILLS = 100


@pytest.mark.slow
def test_each_group_is_trained_once_or_dropped_while_actors_are_killed(tmp_path: Path) -> None:
    with launching(tmp_path) as launch:
        command = launch("--kills", str(NUM_KILLS), module="tests.kills")
        code = command.exit_code(500)
        assert code == 0, command.said()
        while command.left():  # the process that the actors were forked from ends when it finds itself alone
            time.sleep(0.05)
        last = LINE.fullmatch(command.stdout.splitlines()[-1])
    assert last is not None, command.said()
    killed, trained, dropped, again = map(ast.literal_eval, last.groups())
    assert (killed, trained) == (NUM_KILLS, (NUM_KILLS + PEACE) * Load().batch)
    assert dropped.keys() <= {"REWARD_RAISED", "ATTEMPTS_EXHAUSTED"}
    assert again["UNREACHABLE"] >= NUM_KILLS


def test_an_actor_that_ends_by_itself_is_found(tmp_path: Path) -> None:
    actor = Actor("127.0.0.1:0", "actor-0", tmp_path, ["fake.mean_tokens=0"])
    actor.start()
    actor._process.join(30)
    with pytest.raises(ActorEnded, match=r"ended by itself with 2: actor: .*mean_tokens"):
        actor.kill()
    actor.kill()  # nobody is there any more
