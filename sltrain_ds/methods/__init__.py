"""The registry: one file a method, one entry here."""

from sltrain_ds.errors import UserError
from sltrain_ds.methods.base import Method, MethodLinear
from sltrain_ds.methods.convert import convert
from sltrain_ds.methods.full_rank import FullRankConfig
from sltrain_ds.methods.low_rank import LowRankConfig, LowRankLinear
from sltrain_ds.methods.sltrain import SLTrainConfig, SLTrainLinear

METHODS = {
    method.name: method
    for method in (
        Method("sltrain", SLTrainConfig, SLTrainLinear),
        Method("full_rank", FullRankConfig, None),
        Method("low_rank", LowRankConfig, LowRankLinear),
    )
}

__all__ = ["METHODS", "Method", "MethodLinear", "SLTrainConfig", "SLTrainLinear", "convert", "get"]


def get(name: str) -> Method:
    """The method of that name; ``get(name).config(...)`` is what ``convert`` takes."""
    if name not in METHODS:
        raise UserError(f"method.name = {name!r} is not known; choose one of {', '.join(METHODS)}")
    return METHODS[name]
