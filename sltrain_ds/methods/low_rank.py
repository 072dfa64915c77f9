"""Low-rank training: W = s B A, s = alpha / rank.

B = 0 would never train: without S both factors' gradients are exactly zero. Both start from Gaussians instead, balanced, with
standard deviations such that W has std ``init_std``.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from sltrain_ds.errors import UserError
from sltrain_ds.methods.base import MethodLinear, normal
from sltrain_ds.methods.sltrain import check_number


@dataclass(frozen=True)
class LowRankConfig:
    """rank r, alpha, init_std: the standard deviation of W's elements at the start; target_modules None: the architecture's own."""

    rank: int
    alpha: float
    init_std: float = 0.0063
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self):
        check_number("rank", self.rank, integer=True, low=1)
        check_number("alpha", self.alpha, above=0)
        check_number("init_std", self.init_std, above=0)

    def make(self, linear: nn.Linear, layer_name: str, **factory):
        return LowRankLinear(
            linear.in_features,
            linear.out_features,
            rank=self.rank,
            alpha=self.alpha,
            init_std=self.init_std,
            bias=linear.bias is not None,
            layer_name=layer_name,
            **factory,
        )


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
        init_std=0.0063,
        bias=False,
        layer_name=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if rank > min(in_features, out_features):
            name = f" of {layer_name}" if layer_name else ""
            raise UserError(
                f"rank = {rank} exceeds min(in, out) = {min(in_features, out_features)}{name}; choose a rank up to that"
            )
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
        std = math.sqrt(self.init_std / (self.scaling * math.sqrt(self.rank)))  # var W = s^2 r std^4
        self.A.copy_(normal((self.rank, self.in_features), std, generator))
        self.B.copy_(normal((self.out_features, self.rank), std, generator))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.A) * self.scaling, self.B, self.bias)

    @torch.no_grad()
    def dense_weight(self):
        return torch.mm(self.B, self.A).mul_(self.scaling)

    def flops_per_token(self):
        return 2 * self.rank * (self.in_features + self.out_features)
