"""Sparse products of the factored mode, without a dense S: y += x S^T, and its backward.

Implemented in csrc/spmm.cpp for the CPU. If that is not ``available``, the caller makes S dense instead.
"""

import torch

from sltrain_ds.ops import builder, workspace


def available(device: torch.device) -> bool:
    return device.type == "cpu" and builder.load()


def add_product_(y, x, rows, columns, values) -> None:
    """y (tokens, out) += x (tokens, in) S^T, both contiguous, of one dtype; values (nnz,) of any float dtype."""
    torch.ops.sltrain.spmm_(y, x, rows, columns, values, _scratch(y, x, values))


def backward_(dy, x, rows, columns, values, dx, dvalues) -> None:
    """dx (tokens, in) += dy (tokens, out) S, and dvalues (nnz,) = (dy^T x) on the support; either may be empty."""
    torch.ops.sltrain.spmm_backward_(dy, x, rows, columns, values, dx, dvalues, _scratch(dy, x, values))


def _scratch(y, x, values):
    sizes = (x.shape[0], y.shape[1], x.shape[1], values.numel())
    nbytes = torch.ops.sltrain.spmm_scratch(*sizes, max(x.element_size(), values.element_size()))
    dtype = torch.promote_types(x.dtype, torch.float32)
    return workspace.take(1, -(-nbytes // dtype.itemsize), dtype, x.device)
