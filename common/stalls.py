"""How long an event loop did not turn: everything on it, streams and probes alike, waited for so long."""

import asyncio
import collections
import time

_PERIOD_S = 0.005


class StallWatch:
    """Looks at the clock every few milliseconds; a look that comes late was held up by something else on the loop.

    `longest_s` may be asked from any thread.
    """

    def __init__(self, window_s: int = 60) -> None:
        self._window_s = window_s
        # By whole second of the monotonic clock, oldest first.
        self._longest: collections.OrderedDict[int, float] = collections.OrderedDict()

    async def run(self) -> None:
        """Watch until cancelled."""
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(_PERIOD_S)
            now_s = time.monotonic()
            self.add(now_s, now_s - last_s - _PERIOD_S)
            last_s = now_s

    def add(self, now_s: float, late_s: float) -> None:
        """One look, so late."""
        second = int(now_s)
        self._longest[second] = max(late_s, self._longest.get(second, 0.0))
        while next(iter(self._longest)) <= second - self._window_s:
            self._longest.popitem(last=False)

    def longest_s(self) -> float:
        """Of the last `window_s` seconds."""
        return max(self._longest.copy().values(), default=0.0)
