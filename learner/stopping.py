"""How a run ends early. The first SIGTERM or Ctrl-C asks for the end of the step, the next one insists; or it fails."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

# What ranks get for it, before they are killed.
STEP_END_S = 270
# Where torchrun has that from, if it is new enough; others give 30 s.
TORCHRUN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
# torchrun passes on what a scheduler may have sent to every process: two signals within this time are one.
_SAME_S = 1.0


class RunFailed(RuntimeError):  # noqa: N818 - says what happened
    """The run gives up. Its message is all that a user needs; the cause may pass, so the exit code is 1."""


class AgreedStop(KeyboardInterrupt):
    """All ranks end here, because one of them was asked to."""


class StopRequest:
    """What a rank's signals have asked for. Main thread only, but for `is_made`."""

    def __init__(self) -> None:
        self._made_at: float | None = None
        self._is_heeded = False

    @property
    def is_made(self) -> bool:
        """Whether the run should end after this step."""
        return self._made_at is not None

    def install(self) -> None:
        """Take over both signals. Outside of `heeded` they raise KeyboardInterrupt."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """While the block runs the first signal only makes the request: the block looks for it, and ends by itself.

        Raises KeyboardInterrupt after a block that has ended well without having seen it. After a stop, also one that
        another rank was asked for, SIGTERM is ignored: torchrun sends it once the first rank has ended.
        """
        self._is_heeded = True
        is_agreed = False
        try:
            yield
        except AgreedStop:
            is_agreed = True
            raise
        finally:
            self._is_heeded = False
            if self.is_made or is_agreed:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.is_made:
            raise KeyboardInterrupt

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        """A rank is ended as by Ctrl-C, so that everything is taken apart in order."""
        now = time.monotonic()
        if self._is_heeded and self._made_at is None:
            self._made_at = now
        elif self._made_at is None or now - self._made_at > _SAME_S:
            self._made_at = now  # what is interrupted may lose the exception, as a destructor does
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise KeyboardInterrupt
