"""Instruction-set level of the C++ ops; csrc/cpu.cpp detects it once, and all kernels use it.

A level includes all lower ones. SLTRAIN_CPU, for example avx2, forces a level below the processor's: for tests, and to
trace a difference between two machines. It does not affect PyTorch's own products, which have their own variables.
"""

import os

from sltrain_ds.errors import UserError

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")  # as in csrc/cpu.h


def check_name() -> None:
    """Raise UserError if SLTRAIN_CPU is not the name of a level; loads nothing."""
    forced = os.environ.get("SLTRAIN_CPU", "")
    if forced and forced not in LEVELS:
        raise UserError(
            f"SLTRAIN_CPU = {forced!r} is not known; set it to one of {', '.join(LEVELS)} or leave it unset"
        )


def check_processor() -> None:
    """Raise UserError if this processor does not support the level in SLTRAIN_CPU. Requires loaded C++ ops."""
    forced = os.environ.get("SLTRAIN_CPU", "")
    has = available()
    if forced and forced not in has:
        raise UserError(
            f"SLTRAIN_CPU = {forced!r} is not supported by this processor; "
            f"set it to one of {', '.join(has)} or unset it"
        )


def available() -> tuple[str, ...]:
    """Levels that this processor supports, lowest first. Requires loaded C++ ops."""
    import torch

    return LEVELS[: LEVELS.index(torch.ops.sltrain.best_cpu_level()) + 1]


def in_force() -> str:
    """Level that the C++ ops use. Requires loaded C++ ops."""
    import torch

    return torch.ops.sltrain.cpu_level()
