"""How torch's CUDA allocator takes memory from the device."""

import os

import torch

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def grow_segments() -> None:
    """From here on, segments that grow (expandable_segments): freed memory fits what comes next, whatever its size.
    Whoever sets the allocator's variable keeps their own. Nothing happens without CUDA.
    """
    if any(os.environ.get(name) for name in VARIABLES):
        return
    os.environ[VARIABLES[0]] = "expandable_segments:True"  # read when CUDA starts, and by child processes
    if torch.cuda.is_initialized():
        torch.cuda.memory._set_allocator_settings(os.environ[VARIABLES[0]])
