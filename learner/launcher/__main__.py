"""`python -m learner.launcher`: the same as `outrider`."""

import sys

from learner.launcher.main import main

if __name__ == "__main__":
    sys.exit(main())
