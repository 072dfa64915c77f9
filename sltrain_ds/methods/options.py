"""Types of the keys that methods have in common. Imports no torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sltrain_ds.formats import SIZE_LIMIT


class Block(BaseModel):
    """Strict: "3" is no number, true is no number, unknown keys are errors; frozen once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Scale = Annotated[float, Field(ge=0)]
Rank = Annotated[
    int, Field(ge=1, le=SIZE_LIMIT, description="inner dimension of B A; at most min(in, out) of every target")
]
Alpha = Annotated[float, Field(gt=0, description="B A is scaled by alpha / rank")]
Targets = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1, description="name parts of the nn.Linear modules to replace"),
]
DEFAULT_TARGETS = ["self_attn", "mlp"]


class DenseScale(Block):
    """Learning-rate multipliers."""

    dense: Scale = Field(1.0, description="times lr, for every parameter")


class FactorScale(DenseScale):
    dense: Scale = Field(1.0, description="times lr, for embedding, head and norms")
    factors: Scale = Field(1.0, description="times lr, for A and B")


class SparseScale(FactorScale):
    sparse: Scale = Field(1.0, description="times lr, for the values of S")


class MethodOptions(Block):
    """The `sltrain.method` block of a method; a subclass adds its own keys."""

    name: str = Field(description='the method: a name, or "package.module:Class" of your own')
    lr_scale: DenseScale = Field(DenseScale(), description="learning-rate multipliers by role")
