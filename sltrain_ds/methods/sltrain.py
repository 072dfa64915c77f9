"""The settings of SLTrain, W = alpha / rank * B A + S, without torch; its layer is in sltrain_layer.py."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from sltrain_ds.formats import INT64, nonzeros
from sltrain_ds.methods.check import check_number, check_rank
from sltrain_ds.methods.method import Method, Term, factors, rank_misfit
from sltrain_ds.methods.options import DEFAULT_TARGETS, Alpha, MethodOptions, Rank, SparseScale, Targets


class SLTrain(MethodOptions):
    """W = alpha / rank * B A + S, S on a fixed random support."""

    name: Literal["sltrain"] = Field(description="sparse plus low-rank")
    rank: Rank
    density: float = Field(gt=0, le=1, description="fraction of non-zeros in S (the paper's delta)")
    alpha: Alpha
    support_seed: int = Field(0, ge=0, le=INT64, description="seed of the supports; the same on every rank")
    target_modules: Targets = Field(DEFAULT_TARGETS)
    lr_scale: SparseScale = Field(SparseScale(), description="learning-rate multipliers by role")


@dataclass(frozen=True)
class SLTrainConfig(Method):
    """rank r, density (the paper's delta, in (0, 1]; 0 leaves no sparse part), alpha; target_modules None: the
    architecture's own.
    """

    Options: ClassVar = SLTrain
    layer: ClassVar = "sltrain_ds.methods.sltrain_layer:SLTrainLinear"
    composes: ClassVar = True

    rank: int
    density: float
    alpha: float
    support_seed: int = 0
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self):
        check_number("rank", self.rank, integer=True, low=1)
        check_number("density", self.density, low=0, high=1)
        check_number("alpha", self.alpha, above=0)
        check_number("support_seed", self.support_seed, integer=True, low=0, high=INT64)

    def check(self, linear, layer_name: str) -> None:
        check_rank(self.rank, linear.in_features, linear.out_features, layer_name)

    def misfit(self, out_features, in_features):
        if nonzeros(self.density, out_features, in_features) > 0:
            return rank_misfit(self.rank, out_features, in_features)
        least = math.ceil(1e6 / (out_features * in_features)) / 1e6
        empty = "density", f"{self.density:g} leaves {{layer}} without one non-zero; set at least {least:g}"
        return rank_misfit(self.rank, out_features, in_features) or empty

    def parameters(self, out_features, in_features):
        sparse = Term("S_values", (nonzeros(self.density, out_features, in_features),), "sparse")
        return [*factors(self.rank, out_features, in_features), sparse]
