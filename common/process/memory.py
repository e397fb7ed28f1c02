"""What glibc does with memory that has been freed."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGEST_BYTES = 32 * 2**20  # more cannot be said
_KEPT_BYTES = 64 * 2**20


def keep_freed() -> None:
    """Have blocks of up to 32 MiB used again, as glibc does by itself once one of 32 MiB has been freed.

    Until then each block of a MiB, as messages and images have, goes back to the kernel and comes again as pages that
    it has to clear, which takes longer than what is done with them. Each of malloc's arenas, of which a thread has
    one, may keep 64 MiB. Elsewhere than with glibc nothing changes.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGEST_BYTES)
        set_option(_TRIM_THRESHOLD, _KEPT_BYTES)
