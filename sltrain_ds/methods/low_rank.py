"""The settings of low-rank training, W = alpha / rank * B A, without torch; its layer is in low_rank_layer.py."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from sltrain_ds.methods.check import check_number, check_rank
from sltrain_ds.methods.method import Method, factors, rank_misfit
from sltrain_ds.methods.options import DEFAULT_TARGETS, Alpha, FactorScale, MethodOptions, Rank, Targets

INIT_STD = 0.0063


class LowRank(MethodOptions):
    """W = alpha / rank * B A."""

    name: Literal["low_rank"] = Field(description="low-rank weights, the baseline without S")
    rank: Rank
    alpha: Alpha
    init_std: float = Field(
        INIT_STD, gt=0, description="standard deviation of B A at the start; at B = 0 it never trains"
    )
    target_modules: Targets = Field(DEFAULT_TARGETS)
    lr_scale: FactorScale = Field(FactorScale(), description="learning-rate multipliers by role")


@dataclass(frozen=True)
class LowRankConfig(Method):
    """rank r, alpha, init_std: the standard deviation of W's elements at the start; target_modules None: the
    architecture's own.
    """

    Options: ClassVar = LowRank
    layer: ClassVar = "sltrain_ds.methods.low_rank_layer:LowRankLinear"

    rank: int
    alpha: float
    init_std: float = INIT_STD
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self):
        check_number("rank", self.rank, integer=True, low=1)
        check_number("alpha", self.alpha, above=0)
        check_number("init_std", self.init_std, above=0)

    def check(self, linear, layer_name: str) -> None:
        check_rank(self.rank, linear.in_features, linear.out_features, layer_name)

    def misfit(self, out_features, in_features):
        return rank_misfit(self.rank, out_features, in_features)

    def parameters(self, out_features, in_features):
        return factors(self.rank, out_features, in_features)

    def saved_width(self):
        return self.rank
