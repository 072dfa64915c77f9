"""Dense products of the operator. On the CPU csrc/gemm.cpp computes them in fixed blocks, so that results do not
depend on the number of threads. On other devices, and without the C++ ops, PyTorch computes them.
"""

import torch

from sltrain_ds.ops import builder

_addmm = torch.addmm
# on CUDA too, sums over k are accumulated in fp32 and rounded once: cuBLAS must not add partial sums in bf16
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def gemm_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0, bias=None, add=False):
    """out (m, n) = alpha * a (m, k) b (k, n) + bias (n,), or out += with ``add``; returns out.

    a and b have one dtype; without ``add`` out may have a wider one.
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
    """Whether DeepSpeed's flops profiler has replaced torch.addmm to count its calls."""
    return torch.addmm is not _addmm


def column_sum_(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """out (n,) = sum over the rows of x (m, n), contiguous, accumulated in fp32 (fp64); returns out."""
    if out.device.type == "cpu" and builder.load():
        torch.ops.sltrain.column_sum_(out, x)
        return out
    return out.copy_(torch.sum(x, 0, dtype=torch.promote_types(x.dtype, torch.float32)))
