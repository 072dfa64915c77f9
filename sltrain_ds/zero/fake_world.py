"""One process that plays one rank of N: torch's fake process group under the real DeepSpeed engine.

Collectives return at once with what this rank has; so shapes, shards and buffers are those of a rank of N, and losses
mean nothing. The group is from torch/testing/_internal/distributed/fake_pg.py (torch 2.11 to 2.15).
"""

import os

import deepspeed
import torch

from sltrain_ds.errors import UserError
from sltrain_ds.ops import builder


def join(rank: int, world: int) -> None:
    """Be `rank` of `world`, on this process's own device. Raises `UserError` where a real group is up already."""
    if deepspeed.comm.is_initialized() or torch.distributed.is_initialized():
        raise UserError("rehearse: this process has joined a real group of ranks; start it without the launcher")
    if not 0 <= rank < world:
        raise UserError(f"--rank {rank}: must be from 0 to {world - 1}, a rank of --world {world}")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    builder.load()
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is sent: not worth compiling
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def is_fake() -> bool:
    """Whether this process plays its rank alone and receives nothing from other ranks."""
    return torch.distributed.is_initialized() and torch.distributed.get_backend() == "fake"
