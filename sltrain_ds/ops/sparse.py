"""Scatter-add of S into W and gather of dW at the support.

The support is checked once, when it is built (``support.check``); positions are not checked here. The CPU uses
csrc/support.cpp if it could be built, CUDA uses csrc/cuda if the kernels are loaded and support the dtypes (``cuda``
prints once if they cannot be loaded). Otherwise a few lines of PyTorch give the same results.
"""

import torch

from sltrain_ds.ops import builder, cuda, cuda_checks, support


def scatter_add_(W: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> None:
    """W (out, in), contiguous, += values (nnz,) at the support, in place; each sum in fp32 (fp64), rounded once to
    W's dtype.
    """
    if W.device.type == "cpu" and builder.load():
        torch.ops.sltrain.scatter_add_(W, rows, columns, values)
        return
    if on_cuda(W, values):
        cuda.scatter_add_(W, rows, columns, values)
        return
    flat = W.view(-1)
    index = support.to_flat_index(rows, columns, W.shape[1])
    wide = torch.promote_types(torch.float32, torch.promote_types(W.dtype, values.dtype))
    flat[index] = (flat[index].to(wide) + values.to(wide)).to(W.dtype)


def gather(W: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    """out (nnz,) = W (out, in), contiguous, at the support, in out's dtype."""
    if W.device.type == "cpu" and builder.load():
        torch.ops.sltrain.gather(out, W, rows, columns)
        return
    if on_cuda(W, out):
        cuda.gather(out, W, rows, columns)
        return
    out.copy_(W.view(-1)[support.to_flat_index(rows, columns, W.shape[1])])


def on_cuda(W: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the CUDA kernels are used for these tensors."""
    return W.device.type == "cuda" and cuda_checks.supports(W, values) and cuda.load()
