"""Notices a rank that is stopped or cut off: the others would wait for it in a collective for hours.

    beat thread:   each second  own count --> store of the ranks --> counts of all
    watch thread:  each second  whose count has not moved for so many of its own seconds? --> the job ends

A rank that dies needs none of this: its connections break. Both threads are Python's, so they also show that the
interpreter of a rank still turns. The watch counts its own turns and looks at no clock: a machine that slept, or a job
that was stopped and continued as a whole, accuses nobody. A store that cannot be reached is the silence of everybody.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist

from common.log import get_logger
from learner.stopping import AgreedStop

log = get_logger(__name__)

_BEAT_S = 1.0
_STORE_TIMEOUT = timedelta(seconds=5)
_GOODBYE = b"goodbye"


class Silence:
    """For how many looks in a row the beat of each rank has been the same; one that said goodbye may be silent."""

    def __init__(self, num_ranks: int) -> None:
        self._last: list[bytes | None] = [None] * num_ranks
        self._num_looks = [0] * num_ranks

    def look(self, beats: Sequence[bytes]) -> int:
        """Take the beats as they are now, by rank, or nothing while there are none; the longest silence, in looks."""
        for rank, last in enumerate(self._last):
            beat = beats[rank] if beats else last
            is_alive = beat != last or beat == _GOODBYE
            self._num_looks[rank] = 0 if is_alive else self._num_looks[rank] + 1
            self._last[rank] = beat
        return max(self._num_looks)

    def ranks(self, num_looks: int) -> list[int]:
        """Those that have been silent for so many looks at least."""
        return [rank for rank, silent in enumerate(self._num_looks) if silent >= num_looks]


@contextlib.contextmanager
def watching(num_ranks: int, rank: int, timeout_s: float, on_silence: Callable[[str], None]) -> Iterator[None]:
    """Watch the other ranks while the block runs; a block that ends well, or as agreed, says goodbye to them.

    The store is that of MASTER_ADDR and MASTER_PORT, through a connection of its own. `on_silence` is called on another
    thread, with a line that names the ranks that nothing came from for `timeout_s`.
    """
    if num_ranks == 1:
        yield
        return
    watch = _Watch(num_ranks, rank, timeout_s, on_silence)
    try:
        yield
        watch.leaves_well = True
    except AgreedStop:
        watch.leaves_well = True
        raise
    finally:
        watch.stop()


class _Watch:
    def __init__(self, num_ranks: int, rank: int, timeout_s: float, on_silence: Callable[[str], None]) -> None:
        self.leaves_well = False
        self._num_ranks = num_ranks
        self._rank = rank
        self._timeout_s = timeout_s
        self._on_silence = on_silence
        self._beats: list[bytes] = []
        self._stopped = threading.Event()
        # Two threads: the store's answer can stay away for longer than its timeout if the network is cut in its middle.
        loops = (self._beat, self._look)
        self._threads = [threading.Thread(target=loop, name="rank-watch", daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when both threads have ended, unless the store holds one of them."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(_STORE_TIMEOUT.total_seconds())

    def _beat(self) -> None:
        keys = [f"rank-watch/{rank}" for rank in range(self._num_ranks)]
        store = None
        count = 0
        while True:
            is_last = self._stopped.wait(_BEAT_S if count else 0)
            count += 1
            try:
                store = store or _connect()
                if not is_last:
                    store.set(keys[self._rank], str(count))
                    self._beats = store.multi_get(keys)
                elif self.leaves_well:
                    store.set(keys[self._rank], _GOODBYE.decode())
            except RuntimeError as error:  # for whoever looks: the beats do not move
                log.warning("the store of the ranks does not answer", error=str(error).partition("\n")[0])
            if is_last:
                return

    def _look(self) -> None:
        silence = Silence(self._num_ranks)
        num_looks = round(self._timeout_s / _BEAT_S)
        while not self._stopped.wait(_BEAT_S):
            if silence.look(self._beats) >= num_looks:
                what = at_fault(silence, self._rank, num_looks)
                self._on_silence(
                    f"nothing has been heard for {self._timeout_s:g} s of {what}; "
                    "the job ends, and started again it goes on from its last checkpoint"
                )
                return


def at_fault(silence: Silence, own: int, num_looks: int) -> str:
    """Who is at fault that some ranks have been silent for so many looks, as rank `own` sees it.

    Once the store is gone all are silent, but what was seen last of one may be a beat older than of another.
    """
    if own in silence.ranks((num_looks + 1) // 2):
        return "the store that the ranks meet at: the node of rank 0 is gone, or this one is cut off"
    silent = silence.ranks(num_looks)
    return f"{'ranks' if len(silent) > 1 else 'rank'} {', '.join(map(str, silent))}: stopped or cut off"


def _connect() -> dist.TCPStore:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=_STORE_TIMEOUT,
        wait_for_workers=False,
    )
