"""Configuration of the segments of torch's CUDA allocator."""

import os

import torch

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def grow_segments() -> None:
    """Enable expandable_segments, so that freed memory can be reused for blocks of any size. Has no effect if the
    user set one of VARIABLES, or without CUDA.
    """
    if any(os.environ.get(name) for name in VARIABLES):
        return
    os.environ[VARIABLES[0]] = "expandable_segments:True"  # read when CUDA starts, and by child processes
    if torch.cuda.is_initialized():
        torch.cuda.memory._set_allocator_settings(os.environ[VARIABLES[0]])
