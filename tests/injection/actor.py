"""`python -m tests.injection.actor`: `python -m actor` in which a fault (`tests.injection.fault`) can happen.

With `--engine fake` the engine knows what the model's own processor makes of a prompt, so that a learner trains on its
answers.
"""

import sys

from actor import process
from actor.__main__ import main
from actor.config import check_model
from actor.engine import Engine
from tests.injection.fault import Injector
from tests.injection.hooks import on_broadcasts, on_engine


def make_engine(self: process.ActorProcess) -> Engine:
    """In place of `ActorProcess._make_engine`."""
    from tests.processor_engine import ProcessorEngine

    engine = ProcessorEngine(self.config.fake, self.actor_id, check_model(self.config.model))
    injector = Injector()
    on_engine(injector, engine)
    on_broadcasts(injector, sends=False)
    return engine


if __name__ == "__main__":
    process.ActorProcess._make_engine = make_engine  # type: ignore[method-assign]
    sys.exit(main())
