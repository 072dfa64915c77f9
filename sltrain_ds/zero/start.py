"""Joins the ranks; what has to be compiled is compiled before they meet."""

import atexit
import os
import socket
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from sltrain_ds.memory.segments import grow_segments
from sltrain_ds.ops import builder

SHARED_MEMORY = Path("/dev/shm")


def start() -> None:
    """`deepspeed.init_distributed()` (once), after the ops are built and the locks of killed builds are gone.

    DeepSpeed's first start on a CPU compiles `deepspeed_shm_comm`, which is optional, and fails where there is no
    compiler (deepspeed/comm/torch.py:47, 0.19.8). So the op is marked as incompatible there.
    """
    if deepspeed.comm.is_initialized():
        return
    if "RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" not in os.environ:
        _alone()
    grow_segments()
    builder.load()
    if builder.missing_tools():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with builder.tools_on_path():
        builder.build_deepspeed_ops()
        deepspeed.init_distributed()
    _unname_shared_memory()
    if get_accelerator().device_name() == "cpu":
        atexit.register(leave)


def leave() -> None:
    """Destroy the process groups, which ends gloo's threads; a second call does nothing.

    A thread that is still running while Python shuts down can abort the process, and its exit code is lost. DeepSpeed
    clones the world group (deepspeed/utils/groups.py:723, 0.19.8), and its module variable keeps the clone's threads
    running after `destroy_process_group`.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in vars(groups).items():
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(groups, name, None)


def _unname_shared_memory() -> None:
    """DeepSpeed's `shm_comm` shares 69 MB a rank between the ranks of a CPU node and never gives it back
    (csrc/cpu/comm/shm.cpp, 0.19.8): without its names it goes when the last rank does, however that ends. What another
    user's runs have left under the same port is not ours to remove.
    """
    if deepspeed.comm.get_world_size() > 1:
        deepspeed.comm.barrier()  # every rank has opened every other's
    ours = f"deepspeed_*_{os.getuid()}_*_{os.environ['MASTER_PORT']}_{deepspeed.comm.get_rank()}"
    for shared in SHARED_MEMORY.glob(ours):
        shared.unlink(missing_ok=True)


def _alone() -> None:
    """No launcher started this process: it is the one rank of a world of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, value in alone.items():
        os.environ.setdefault(key, str(value))
