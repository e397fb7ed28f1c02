"""`python -m tests.injection.learner`: `python -m learner` in which a fault (`tests.injection.fault`) can happen."""

from learner.__main__ import main
from tests.injection.fault import Injector
from tests.injection.hooks import on_learner

if __name__ == "__main__":
    on_learner(Injector())
    main()
