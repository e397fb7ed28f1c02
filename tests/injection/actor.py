"""`python -m tests.injection.actor`: `python -m actor` in which a fault (`tests.injection.fault`) can happen.

The engine is that of `tests.digits_engine`, so that a learner trains on its answers; what it has to know of the prompt
is the file PROMPT beside the model.
"""

import json
import sys

from actor import process
from actor.__main__ import main
from actor.config import check_model
from actor.engine import Engine
from tests.digits_engine import DigitsEngine, DigitsPrompt
from tests.injection.fault import Injector
from tests.injection.hooks import on_engine

PROMPT = "prompt.json"


def make_engine(self: process.ActorProcess) -> Engine:
    """In place of `ActorProcess._loaded_engine`."""
    fields = json.loads((check_model(self.config.model) / PROMPT).read_text())
    prompt = DigitsPrompt(tuple(fields["ids"]), tuple(fields["placeholders"]))
    engine = DigitsEngine(self.config.fake, self.actor_id, prompt)
    on_engine(Injector(), engine)
    return engine


if __name__ == "__main__":
    process.ActorProcess._loaded_engine = make_engine  # type: ignore[method-assign]
    sys.exit(main())
