"""The dense products of the operator. On the CPU csrc/gemm.cpp cuts them into fixed blocks, so that results do not
depend on the number of threads; elsewhere, and without the C++ ops, PyTorch's own.
"""

import torch

from sltrain_ds.ops import builder

_addmm = torch.addmm
# a sum over k is accumulated in fp32 and rounded once on CUDA too: cuBLAS may not add partial sums in bf16
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def gemm_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0, bias=None, add=False):
    """out (m, n) = alpha * a (m, k) b (k, n) + bias (n,), or out += with ``add``; returns out.

    a and b have one dtype; without ``add`` out may be wider than they are.
    """
    if out.dtype != a.dtype:  # autocast: the gradient is wider than the product
        return out.copy_(gemm_(torch.empty_like(out, dtype=a.dtype), a, b)).mul_(alpha)
    if out.device.type == "cpu" and builder.load() and not is_counted():
        torch.ops.sltrain.gemm_(out, a, b, alpha, add, bias)
        return out
    if bias is None:
        return torch.addmm(out, a, b, beta=int(add), alpha=alpha, out=out)
    return torch.addmm(bias, a, b, alpha=alpha, out=out)


def is_counted() -> bool:
    """Whether DeepSpeed's flops profiler stands in torch.addmm's place and counts what goes through it."""
    return torch.addmm is not _addmm


def column_sum_(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """out (n,) = sum over the rows of x (m, n), contiguous, in fp32 (fp64); returns out."""
    if out.device.type == "cpu" and builder.load():
        torch.ops.sltrain.column_sum_(out, x)
        return out
    return out.copy_(torch.sum(x, 0, dtype=torch.promote_types(x.dtype, torch.float32)))
