"""Settings of glibc's malloc that return freed memory to the system."""

import ctypes
import os

_M_MMAP_THRESHOLD = -3  # malloc.h
_THRESHOLD = 1 << 20


def give_back_large_blocks() -> bool:
    """Map blocks of 1 MiB and more individually, so that a freed tensor is returned to the system. Returns False if
    the environment sets it (MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES) or the C library is not glibc.

    By default glibc raises the threshold, up to 32 MiB, whenever a block is freed, and smaller blocks stay in
    fragmented heaps. The cost is a page fault for every page of a new tensor, so this is for memory-bound runs.
    docs/memory.md has the cost of both at 350M parameters.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    return bool(_libc("mallopt", _M_MMAP_THRESHOLD, _THRESHOLD))


def give_back_holes() -> bool:
    """Return the free pages in malloc's heaps to the system; False if there were none or the C library is not glibc.
    Called after `initialize`, whose scratch memory is not needed again."""
    return bool(_libc("malloc_trim", 0))


def _libc(name: str, *arguments: int) -> int:
    try:
        return getattr(ctypes.CDLL(None), name)(*arguments)
    except (OSError, AttributeError):
        return 0
