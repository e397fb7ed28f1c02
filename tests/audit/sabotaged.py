"""`python -m tests.audit.sabotaged`: an actor one of whose handlers unpickles. What watches for that must see it."""

import collections
import pickle
import sys
from typing import Any

from actor import __main__ as actor_main
from actor.services import rollout as service_rollout

service: Any = service_rollout
check_request = service.check_request


def unpickling(*arguments: Any) -> None:
    """As `check_request`, but for a pickle, which is harmless and might not have been."""
    pickle.loads(pickle.dumps(collections.Counter("abc")))
    check_request(*arguments)


if __name__ == "__main__":
    service.check_request = unpickling
    sys.exit(actor_main.main())
