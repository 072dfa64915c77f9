"""The dense products of the operator. On the CPU csrc/gemm.cpp cuts them into fixed blocks, so that results do not
depend on the number of threads; elsewhere, and without the C++ ops, PyTorch's own.
"""

import torch

from sltrain_ds.ops import builder


def gemm_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0, bias=None) -> torch.Tensor:
    """out (m, n) = alpha * a (m, k) b (k, n) + bias (n,), a and b in one dtype; out may be wider than they are."""
    if out.dtype != a.dtype:  # autocast: the gradient is wider than the product
        return out.copy_(gemm_(torch.empty_like(out, dtype=a.dtype), a, b)).mul_(alpha)
    if out.device.type == "cpu" and builder.load():
        torch.ops.sltrain.gemm_(out, a, b, alpha, bias)
        return out
    if bias is None:
        return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)
    return torch.addmm(bias, a, b, alpha=alpha, out=out)
