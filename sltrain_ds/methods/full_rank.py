"""Full-rank training: every ``nn.Linear`` stays as it is. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from sltrain_ds.methods.method import Method
from sltrain_ds.methods.options import DenseScale, MethodOptions


class FullRank(MethodOptions):
    """Plain nn.Linear layers."""

    name: Literal["full_rank"] = Field(description="dense weights, the baseline")
    lr_scale: DenseScale = Field(DenseScale(), description="learning-rate multipliers by role")


@dataclass(frozen=True)
class FullRankConfig(Method):
    """Nothing to choose."""

    Options: ClassVar = FullRank
