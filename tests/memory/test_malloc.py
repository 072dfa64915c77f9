"""What a process holds after it freed its arrays, with and without memory/malloc.py's two calls."""

import platform
import subprocess
import sys

import pytest

ARRAYS, MIB = 64, 1 << 20
PROCESS = """
import sys
import numpy as np
from sltrain_ds.memory.gauge import resident
from sltrain_ds.memory.malloc import give_back_holes, give_back_large_blocks
count, size, call = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def free_all_but_the_last():
    arrays = [np.ones(size, np.uint8) for _ in range(count)]
    return arrays[-1]
if call == "large blocks":
    assert give_back_large_blocks()
free_all_but_the_last()  # glibc raises its threshold here, unless it was told one
before = resident()[0]
last = free_all_but_the_last()
if call == "holes":
    assert give_back_holes()
print(resident()[0] - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
@pytest.mark.parametrize("size, call", [(2 * MIB, "large blocks"), (MIB // 4, "holes")])
def test_freed_blocks_leave_the_process(size, call, monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)

    def held(call):
        command = [sys.executable, "-c", PROCESS, str(ARRAYS), str(size), call]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    freed = (ARRAYS - 1) * size
    assert held(call) < 0.2 * freed
    assert held("nothing") > 0.8 * freed
