"""The low-rank layer: W = s B A, s = alpha / rank.

B = 0 would never train: without S both factors' gradients are exactly zero. So the factors start as the top singular
vectors and values of a Gaussian matrix would (spectral initialisation: Khodak et al., "Initialization and
regularization of factorized neural layers", ICLR 2021), scaled so that the elements of W have standard deviation
``init_std``. The vectors of a Gaussian matrix are uniform and its values follow the Marchenko-Pastur law, so they are
drawn directly, without an SVD.
"""

import math

import numpy as np
import torch
from torch import nn

from sltrain_ds.methods.check import check_rank
from sltrain_ds.methods.layer import MethodLinear, normal
from sltrain_ds.methods.low_rank import INIT_STD


class LowRankLinear(MethodLinear):
    """Parameters A (rank, in), B (out, rank), bias (out,) or None; y = s (x A^T) B^T + bias, W never built."""

    roles = {"A": "factors", "B": "factors"}  # noqa: RUF012

    def __init__(
        self,
        in_features,
        out_features,
        *,
        rank,
        alpha,
        init_std=INIT_STD,
        bias=False,
        layer_name=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_rank(rank, in_features, out_features, layer_name)
        self.in_features, self.out_features, self.layer_name = in_features, out_features, layer_name or ""
        self.rank, self.alpha, self.init_std, self.scaling = rank, alpha, init_std, alpha / rank
        factory = {"device": device, "dtype": dtype}
        self.A = nn.Parameter(torch.empty(rank, in_features, **factory))
        self.B = nn.Parameter(torch.empty(out_features, rank, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        if not self.A.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator=None):
        """W of rank ``rank`` with a Gaussian's leading spectrum and elements of std init_std; both factors carry its
        root.
        """
        values = gaussian_spectrum(self.out_features, self.in_features)[: self.rank]
        values *= self.init_std * math.sqrt(self.in_features * self.out_features / (values**2).sum())
        root = torch.from_numpy(np.sqrt(values / self.scaling))
        V = orthonormal(self.in_features, self.rank, generator)
        U = orthonormal(self.out_features, self.rank, generator)
        self.A.copy_((V * root).T)
        self.B.copy_(U * root)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.A) * self.scaling, self.B, self.bias)

    @torch.no_grad()
    def dense_weight(self):
        return torch.mm(self.B, self.A).mul_(self.scaling)

    def flops_per_token(self):
        return 2 * self.rank * (self.in_features + self.out_features)


def gaussian_spectrum(rows: int, columns: int) -> np.ndarray:
    """Singular values, descending, float64, of a large rows x columns matrix of N(0, 1): quantiles of the
    Marchenko-Pastur law.
    """
    small, large = min(rows, columns), max(rows, columns)
    ratio = math.sqrt(small / large)
    low, high = (1 - ratio) ** 2, (1 + ratio) ** 2
    # eigenvalue = low + (high - low) sin^2(angle) takes the roots at both ends out of the density
    angle = (np.arange(20000) + 0.5) * (math.pi / 40000)
    eigenvalue = low + (high - low) * np.sin(angle) ** 2
    mass = np.cumsum((np.sin(angle) * np.cos(angle)) ** 2 / eigenvalue)
    wanted = (np.arange(small)[::-1] + 0.5) / small
    return np.sqrt(large * np.interp(wanted, mass / mass[-1], eigenvalue))


def orthonormal(size: int, rank: int, generator) -> torch.Tensor:
    """(size, rank) orthonormal columns, uniform: a Gaussian matrix through Cholesky, six times faster than QR at 7B
    shapes.

    In float64, so that the values in fp32 hardly depend on the linear algebra library or its threads.
    """
    X = normal((size, rank), 1.0, generator).double()
    return torch.linalg.solve_triangular(torch.linalg.cholesky(X.T @ X), X.T, upper=False).T
