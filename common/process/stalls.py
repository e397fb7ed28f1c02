"""How long an event loop did not turn: everything on it, streams and probes alike, waited for so long."""

import asyncio
import collections
import time

_PERIOD_S = 0.005


class Longest:
    """The longest of the times of the last `window_s` seconds."""

    def __init__(self, window_s: int = 60) -> None:
        self._window_s = window_s
        # By whole second of the monotonic clock, oldest first.
        self._by_second: collections.OrderedDict[int, float] = collections.OrderedDict()

    def add(self, now_s: float, time_s: float) -> None:
        """One time, taken now."""
        second = int(now_s)
        self._by_second[second] = max(time_s, self._by_second.get(second, 0.0))
        while next(iter(self._by_second)) <= second - self._window_s:
            self._by_second.popitem(last=False)

    def value_s(self) -> float:
        """May be asked from any thread."""
        return max(self._by_second.copy().values(), default=0.0)


class StallWatch:
    """Looks at the clock every few milliseconds; a look that comes late was held up.

    `stalled` is by how much; `busy` is how long the loop's own thread computed meanwhile. A stall without that is the
    machine's: other processes had the core, or other threads of this one the interpreter.
    """

    def __init__(self) -> None:
        self.stalled = Longest()
        self.busy = Longest()

    async def run(self) -> None:
        """Watch until cancelled."""
        last_s, last_busy_s = time.monotonic(), time.thread_time()
        while True:
            await asyncio.sleep(_PERIOD_S)
            now_s, busy_s = time.monotonic(), time.thread_time()
            self.stalled.add(now_s, now_s - last_s - _PERIOD_S)
            self.busy.add(now_s, busy_s - last_busy_s)
            last_s, last_busy_s = now_s, busy_s
