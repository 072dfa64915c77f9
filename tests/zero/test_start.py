"""What a start tidies up is its own alone, and what it began ends before Python does."""

import os
import subprocess
import sys

from sltrain_ds.zero import start


def test_the_shared_memory_of_another_user_stays(monkeypatch, tmp_path):
    """DeepSpeed names it by user, address, port and rank, and most runs have the same port."""
    monkeypatch.setattr(start, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(start.deepspeed.comm, "get_world_size", lambda: 1)
    monkeypatch.setattr(start.deepspeed.comm, "get_rank", lambda: 0)
    monkeypatch.setenv("MASTER_PORT", "29500")
    user = os.getuid()
    names = {place: tmp_path / f"deepspeed_allreduce_buffer_{place}" for place in (
        f"{user}_127.0.0.1_29500_0", f"{user}_127.0.0.1_29500_1", f"{user}_127.0.0.1_29501_0",
        f"{user + 1}_127.0.0.1_29500_0",
    )}  # fmt: skip
    for path in names.values():
        path.touch()
    start._unname_shared_memory()
    assert [place for place, path in names.items() if not path.exists()] == [f"{user}_127.0.0.1_29500_0"]


def test_no_communication_thread_is_left_when_python_ends():
    """DeepSpeed's clone of the world group included. What is registered first runs last: it sees what `leave` left."""
    process = subprocess.run(
        [sys.executable, "-c", "import atexit, glob, torch\n"
         "gloo = lambda: sum('gloo' in open(path).read() for path in glob.glob('/proc/self/task/*/comm'))\n"
         "atexit.register(lambda: print('alive at the end:', torch.distributed.is_initialized(), gloo()))\n"
         "from sltrain_ds.zero.start import start\n"
         "from deepspeed.utils import groups\n"
         "start()\n"
         "before = gloo()\n"
         "groups._clone_world_group()\n"
         "assert torch.distributed.is_initialized() and gloo() > before > 0\n"],
        env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.splitlines()[-1] == "alive at the end: False 0"
