"""Which of the processor's instruction sets the C++ ops use; csrc/cpu.cpp finds it, once, and all kernels go by it.

A level has all that those before it have. SLTRAIN_CPU=avx2, say, forces a lower one than the processor's own: it is for
tests, and for tracing a difference between two machines. PyTorch's own products go by PyTorch's own variables.
"""

import os

from sltrain_ds.errors import UserError

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")  # as in csrc/cpu.h


def check_name() -> None:
    """UserError where SLTRAIN_CPU is no level's name; loads nothing."""
    forced = os.environ.get("SLTRAIN_CPU", "")
    if forced and forced not in LEVELS:
        raise UserError(
            f"SLTRAIN_CPU = {forced!r} is not known; set it to one of {', '.join(LEVELS)} or leave it unset"
        )


def check_processor() -> None:
    """UserError where this processor lacks the level that SLTRAIN_CPU names; the C++ ops are loaded."""
    forced = os.environ.get("SLTRAIN_CPU", "")
    has = available()
    if forced and forced not in has:
        raise UserError(
            f"SLTRAIN_CPU = {forced!r} is not in this processor; set it to one of {', '.join(has)} or unset it"
        )


def available() -> tuple[str, ...]:
    """The levels that this processor has, lowest first; the C++ ops are loaded."""
    import torch

    return LEVELS[: LEVELS.index(torch.ops.sltrain.best_cpu_level()) + 1]


def in_force() -> str:
    """The level that the C++ ops run at; they are loaded."""
    import torch

    return torch.ops.sltrain.cpu_level()
