"""Where a reward function has raised: in the user's own code, however deep in a library it was."""

import sysconfig
import traceback
from pathlib import Path

from learner.rewards.base import RewardError

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
# They call the function.
_CALLERS = {str(Path(__file__).with_name(name)) for name in ("batch.py", "forms.py", "single.py")}
# The end of a traceback says most.
_MAX_TRACE = 4000


def raised(error: Exception, where: str, name: str) -> RewardError:
    """What the function `name` has raised, with the innermost place in the user's code, and the traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in _CALLERS]
    own = [frame for frame in frames if not frame.filename.startswith(("<", *_LIBRARIES))] or frames[:1]
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    message = f"{where}: {type(error).__name__}: {error} ({name}){place}"
    return RewardError(
        "REWARD_RAISED", message, trace="".join(traceback.format_exception(error))[-_MAX_TRACE:], place=f"{name}{place}"
    )
