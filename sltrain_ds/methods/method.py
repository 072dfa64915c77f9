"""What the stack knows of a method before any tensor exists. Imports no torch.

The config's types, its checks, the memory estimate and the docs' tables follow from a `Method`; the layer itself is a
`MethodLinear` (methods/layer.py). docs/extending.md adds one.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

from sltrain_ds.extensions import load_class
from sltrain_ds.methods.options import MethodOptions


class Term(NamedTuple):
    """A parameter that a method's layer holds: its own name, shape, and role ("factors", "sparse" or "dense")."""

    name: str
    shape: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class Method:
    """The settings of a method, which `convert` takes; a subclass is a frozen dataclass that adds its own.

    `Options` are its keys in the JSON. `layer` is the `MethodLinear` that replaces each targeted `nn.Linear`, as a
    class or "module:Class"; None leaves them as they are. `composes`: W is built in the shared workspace, and
    `sltrain.op_mode` applies. `target_modules` None: the architecture's attention and MLP blocks.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    layer: ClassVar[str | type | None] = None
    composes: ClassVar[bool] = False
    target_modules = None  # without a type: a dataclass would put it before the settings that a subclass adds

    @classmethod
    def of(cls, options) -> "Method":
        """The method of a `sltrain.method` block."""
        return cls(
            **{field.name: getattr(options, field.name) for field in fields(cls) if hasattr(options, field.name)}
        )

    @classmethod
    def layer_class(cls) -> type | None:
        """The layer's class; imports torch."""
        if not isinstance(cls.layer, str):
            return cls.layer
        from sltrain_ds.methods.layer import MethodLinear

        return load_class(cls.layer, MethodLinear, cls.__name__)

    def make(self, linear, layer_name: str, **factory):
        """The layer that replaces `linear`; `factory` are device and dtype."""
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "target_modules"}
        return self.layer_class()(
            linear.in_features, linear.out_features, bias=linear.bias is not None, layer_name=layer_name,
            **settings, **factory,
        )  # fmt: skip

    def check(self, linear, layer_name: str) -> None:
        """Raise `UserError` where the layer does not fit `linear`; all targets are checked before one is replaced."""

    def misfit(self, out_features: int, in_features: int) -> tuple[str, str] | None:
        """(key, message with "{layer}" in it) where a setting does not fit a layer of that shape, else None."""
        return None

    def parameters(self, out_features: int, in_features: int) -> list[Term]:
        """What its layer holds in place of W (out, in), but for the bias, in the order of the layer's parameters."""
        raise NotImplementedError(f"{type(self).__name__}.parameters: the memory estimate needs it")

    def saved_width(self) -> int:
        """Elements a token that the layer's forward saves for backward beside x."""
        return 0


def factors(rank: int, out_features: int, in_features: int) -> list[Term]:
    """A (rank, in) and B (out, rank)."""
    return [Term("A", (rank, in_features), "factors"), Term("B", (out_features, rank), "factors")]


def rank_misfit(rank: int, out_features: int, in_features: int):
    """`Method.misfit` of a rank beyond min(in, out), which holds no more than W itself."""
    least = min(out_features, in_features)
    return ("rank", f"{rank} is above min(in, out) of {{layer}}; set at most {least}") if rank > least else None
