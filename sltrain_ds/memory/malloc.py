"""glibc's malloc, told to give memory back."""

import ctypes
import os

_M_MMAP_THRESHOLD = -3  # malloc.h
_THRESHOLD = 1 << 20


def give_back_large_blocks() -> bool:
    """Have blocks from 1 MiB up mapped one by one, so that a freed tensor leaves the process. False where the
    environment has settled it (MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES) or the C library is another.

    Left alone glibc raises the threshold, up to 32 MiB, with every block that is freed, and keeps what lies below in
    heaps full of holes. The price is a page fault for every page of a new tensor, so it is for runs where memory is the
    point. docs/memory.md has what both cost at 350M parameters.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    return bool(_libc("mallopt", _M_MMAP_THRESHOLD, _THRESHOLD))


def give_back_holes() -> bool:
    """Return the free pages between the blocks of malloc's heaps to the system; False where there were none, or where
    the C library is another. For after `initialize`, whose scratch the run never needs again."""
    return bool(_libc("malloc_trim", 0))


def _libc(name: str, *arguments: int) -> int:
    try:
        return getattr(ctypes.CDLL(None), name)(*arguments)
    except (OSError, AttributeError):
        return 0
