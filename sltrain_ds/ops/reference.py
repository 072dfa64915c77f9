"""Reference for W = scaling * B A + S in plain, differentiable PyTorch, against which every kernel is tested."""

import torch


def dense_sparse(values, flat_index, shape):
    """S as a dense (out, in) matrix from (nnz,) values at int64 flat positions."""
    return (
        torch.zeros(shape, dtype=values.dtype, device=values.device)
        .reshape(-1)
        .scatter_add(0, flat_index, values)
        .reshape(shape)
    )


def dense_weight(A, B, values, flat_index, scaling):
    """W (out, in) from A (rank, in), B (out, rank); the paper's section 3.2."""
    return scaling * (B @ A) + dense_sparse(values, flat_index, (B.shape[0], A.shape[1]))


def linear(x, A, B, values, flat_index, scaling, bias=None):
    """y = x W^T + b for x (..., in)."""
    return torch.nn.functional.linear(x, dense_weight(A, B, values, flat_index, scaling), bias)
