"""What glibc does with memory that has been freed."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_KEPT_BYTES = 256 * 2**20
_LARGEST_KEPT_BYTES = 32 * 2**20  # more cannot be said


def keep_freed() -> None:
    """Have blocks of up to 32 MiB used again. Elsewhere than with glibc nothing changes.

    By default each block of a MiB, as messages and images have, goes back to the kernel and comes again as pages that
    it has to clear, which takes longer than what is done with them.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        set_option(_TRIM_THRESHOLD, _KEPT_BYTES)
