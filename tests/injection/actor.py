"""`python -m tests.injection.actor`: `python -m actor` in which a fault (`tests.injection.fault`) can happen.

The fake engine is that of `tests.helpers.digits_engine`, so that a learner trains on its answers; what it has to know
of the prompt is the file PROMPT beside the model. With vLLM faults happen in two processes: in this one, and in vLLM's
engine core, where the weights arrive.
"""

import json
import sys

from actor import process
from actor.__main__ import main
from actor.config import check_model
from actor.engine import Engine
from tests.helpers.digits_engine import DigitsEngine, DigitsPrompt
from tests.injection.fault import Injector
from tests.injection.hooks import on_engine, on_receiver

PROMPT = "prompt.json"

_loaded_engine = process.ActorProcess._loaded_engine


def loaded_engine(self: process.ActorProcess) -> Engine:
    """In place of `ActorProcess._loaded_engine`."""
    engine = _digits_engine(self) if self.config.engine == "fake" else _loaded_engine(self)
    on_engine(Injector(), engine)
    return engine


def _digits_engine(self: process.ActorProcess) -> Engine:
    fields = json.loads((check_model(self.config.model) / PROMPT).read_text())
    prompt = DigitsPrompt(tuple(fields["ids"]), tuple(fields["placeholders"]))
    return DigitsEngine(self.config.fake, self.actor_id, prompt)


if __name__ == "__main__":
    process.ActorProcess._loaded_engine = loaded_engine  # type: ignore[method-assign]
    sys.exit(main())
if __name__ == "__mp_main__":  # as a process that multiprocessing spawns imports it: the engine core
    on_receiver(Injector())
