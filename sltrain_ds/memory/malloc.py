"""glibc's malloc, told to give large blocks back."""

import ctypes
import os

_M_MMAP_THRESHOLD = -3  # malloc.h
_THRESHOLD = 128 << 10  # glibc's own start value


def give_back_large_blocks() -> bool:
    """Have blocks from 128 KiB up mapped one by one, so that a freed tensor leaves the process. False where the
    environment has settled it (MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES) or the C library is another.

    Left alone glibc raises the threshold, up to 32 MiB, with every block that is freed, and keeps what lies below in
    heaps full of holes: 0.34 GB of 1.78 at 350M parameters. The price is a page fault for every 4 KiB of a new tensor,
    so it is for runs where memory is the point.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD))
    except (OSError, AttributeError):
        return False
