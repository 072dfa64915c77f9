"""A method from outside the package, as docs/extending.md builds it: CoLA's layer, y = B silu(A x)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from sltrain_ds.methods.layer import MethodLinear, normal
from sltrain_ds.methods.method import Method, factors, rank_misfit
from sltrain_ds.methods.options import FactorScale, MethodOptions, Rank


class CoLALinear(MethodLinear):
    """A (rank, in) and B (out, rank); y = B silu(A x) + bias."""

    roles: ClassVar = {"A": "factors", "B": "factors"}

    def __init__(self, in_features, out_features, *, rank, bias=False, layer_name="", device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.rank, self.layer_name = in_features, out_features, rank, layer_name
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if not self.A.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator=None):
        self.A.copy_(normal(self.A.shape, self.in_features**-0.5, generator))
        self.B.copy_(normal(self.B.shape, self.rank**-0.5, generator))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x):
        return nn.functional.linear(nn.functional.silu(nn.functional.linear(x, self.A)), self.B, self.bias)


@dataclass(frozen=True)
class CoLA(Method):
    """rank r of both factors."""

    class Options(MethodOptions):
        rank: Rank
        lr_scale: FactorScale = Field(FactorScale(), description="learning-rate multipliers by role")

    layer: ClassVar = CoLALinear

    rank: int

    def misfit(self, out_features, in_features):
        return rank_misfit(self.rank, out_features, in_features)

    def parameters(self, out_features, in_features):
        return factors(self.rank, out_features, in_features)

    def saved_width(self):
        return 2 * self.rank  # A x, and silu of it
