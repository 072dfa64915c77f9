"""Methods by name: the built-in ones, and those of the user. Imports no torch."""

from sltrain_ds.errors import UserError
from sltrain_ds.extensions import is_dotted, load_class
from sltrain_ds.methods.full_rank import FullRankConfig
from sltrain_ds.methods.low_rank import LowRankConfig
from sltrain_ds.methods.method import Method
from sltrain_ds.methods.sltrain import SLTrainConfig

METHODS = {"sltrain": SLTrainConfig, "full_rank": FullRankConfig, "low_rank": LowRankConfig}


def get(name: str, where: str = "sltrain.method.name") -> type[Method]:
    """The method of that name, built in or "package.module:Class". Raises `UserError`, which begins with `where`."""
    if is_dotted(name):
        return load_class(name, Method, where)
    if name not in METHODS:
        raise UserError(f"method.name = {name!r} is not known; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def method_of(block) -> Method:
    """The method of a `sltrain.method` block."""
    return block if isinstance(block, Method) else get(block.name).of(block)
