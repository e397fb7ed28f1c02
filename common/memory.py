"""What glibc does with memory that has been freed."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGEST_BYTES = 8 * 2**20
_KEPT_BYTES = 16 * 2**20


def keep_freed() -> None:
    """Have blocks of up to 8 MiB used again, for up to 16 MiB in each of malloc's arenas, of which a thread has one.

    By default each block of a MiB, as messages and images have, goes back to the kernel and comes again as pages that
    it has to clear, which takes longer than what is done with them. Elsewhere than with glibc nothing changes.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGEST_BYTES)
        set_option(_TRIM_THRESHOLD, _KEPT_BYTES)
