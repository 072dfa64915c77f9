"""Parameters of a LLaMA-class model under a method, computed from the config without torch or a model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from sltrain_ds.config.shapes import model_fields
from sltrain_ds.errors import UserError
from sltrain_ds.formats import column_bytes, nonzeros
from sltrain_ds.methods.method import Method
from sltrain_ds.methods.options import DEFAULT_TARGETS
from sltrain_ds.methods.registry import method_of

__all__ = ["GROUPS", "Linear", "Model", "Shape", "Support", "Tensor", "count", "model_fields", "nonzeros"]

GROUPS = ("factors", "sparse", "dense", "norms")  # the optimizer's groups, in its order
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Tensor:
    """A trainable tensor: dotted name, shape and optimizer group."""

    name: str
    shape: tuple[int, ...]
    group: str

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Linear:
    """An `nn.Linear` of the dense model: W is (out_features, in_features)."""

    name: str
    out_features: int
    in_features: int
    bias: bool = False

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Support:
    """The fixed support of one layer, row-wise: int32 row pointers, uint16 columns (int32 if in > 65,536)."""

    out_features: int
    in_features: int
    nnz: int

    @property
    def bytes(self) -> int:
        return 4 * (self.out_features + 1) + column_bytes(self.in_features) * self.nnz


@dataclass(frozen=True)
class Shape:
    """Sizes from a LLaMA-class config, with the defaults of `transformers.LlamaConfig`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def of(cls, fields: dict) -> "Shape":
        kind = fields.get("model_type", "llama")
        if kind not in _LLAMA_LIKE:
            raise UserError(
                f'sltrain.model: cannot count a "{kind}" model without building it; known: {", ".join(_LLAMA_LIKE)}'
            )
        try:
            hidden, heads = fields.get("hidden_size", 4096), fields.get("num_attention_heads", 32)
            attention_bias = bool(fields.get("attention_bias", False))
            return cls(
                hidden=hidden,
                intermediate=fields.get("intermediate_size", 11008),
                layers=fields.get("num_hidden_layers", 32),
                heads=heads,
                kv_heads=fields.get("num_key_value_heads") or heads,
                head_dim=fields.get("head_dim") or hidden // heads,
                vocab=fields.get("vocab_size", 32000),
                tied=bool(fields.get("tie_word_embeddings", kind == "qwen2")),
                qkv_bias=attention_bias or kind == "qwen2",
                o_bias=attention_bias and kind != "qwen2",
                mlp_bias=bool(fields.get("mlp_bias", False)) and kind == "llama",
                qk_norm=kind == "qwen3",
            )
        except (TypeError, ZeroDivisionError) as error:
            raise UserError(f"sltrain.model: sizes must be positive integers ({error})") from None

    def linears(self, layer: int) -> Iterator[Linear]:
        """The seven projections of one block, in the model's order."""
        at, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield Linear(at + "q_proj", q, self.hidden, self.qkv_bias)
        yield Linear(at + "k_proj", kv, self.hidden, self.qkv_bias)
        yield Linear(at + "v_proj", kv, self.hidden, self.qkv_bias)
        yield Linear(at + "o_proj", self.hidden, q, self.o_bias)
        yield Linear(mlp + "gate_proj", self.intermediate, self.hidden, self.mlp_bias)
        yield Linear(mlp + "up_proj", self.intermediate, self.hidden, self.mlp_bias)
        yield Linear(mlp + "down_proj", self.hidden, self.intermediate, self.mlp_bias)


@dataclass(frozen=True)
class Composed:
    """Layers of one shape whose W is composed: their number, elements per W, and rank."""

    layers: int
    numel: int
    rank: int


@dataclass(frozen=True)
class Model:
    """The counted model, its tensors in `named_parameters()` order."""

    shape: Shape
    tensors: tuple[Tensor, ...]
    supports: tuple[Support, ...]
    workspace: int  # elements of the largest composed W
    kept_width: int  # elements per token that the forwards save in addition to x, summed over layers
    composed: dict[str, "Composed"] = field(default_factory=dict)  # by shape "OUTxIN", as in sltrain.op_mode
    scores: int = 0  # sequence length if attention saves its weights (eager), else 0

    @property
    def parameters(self) -> int:
        return sum(t.numel for t in self.tensors)

    def by_group(self) -> dict[str, list[Tensor]]:
        """Tensors per optimizer group, without empty groups."""
        groups = {group: [t for t in self.tensors if t.group == group] for group in GROUPS}
        return {group: tensors for group, tensors in groups.items() if tensors}


def count(shape: Shape, method=None) -> Model:
    """Count the model of `shape` with `method` (a `sltrain.method` block) in its targeted projections; None: dense."""
    counted = _Counter(None if method is None else method_of(method))
    counted.add("model.embed_tokens.weight", (shape.vocab, shape.hidden), "dense")
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        for linear in shape.linears(layer):
            counted.add_linear(linear)
            if shape.qk_norm and linear.name.endswith("o_proj"):
                counted.add(at + "self_attn.q_norm.weight", (shape.head_dim,), "norms")
                counted.add(at + "self_attn.k_norm.weight", (shape.head_dim,), "norms")
        counted.add(at + "input_layernorm.weight", (shape.hidden,), "norms")
        counted.add(at + "post_attention_layernorm.weight", (shape.hidden,), "norms")
    counted.add("model.norm.weight", (shape.hidden,), "norms")
    if not shape.tied:
        counted.add_linear(Linear("lm_head", shape.vocab, shape.hidden))
    return Model(shape, tuple(counted.tensors), tuple(counted.supports), counted.workspace, counted.kept_width,
                 counted.composed)  # fmt: skip


class _Counter:
    def __init__(self, method: Method | None):
        self.method = method if method is not None and method.layer is not None else None
        self.tensors, self.supports, self.workspace, self.kept_width = [], [], 0, 0
        self.composed = {}

    def add(self, name, shape, group):
        self.tensors.append(Tensor(name, shape, group))

    def add_linear(self, linear: Linear):
        out, inn = linear.out_features, linear.in_features
        if self.method is None or not targeted(linear.name, self.method.target_modules or DEFAULT_TARGETS):
            self.add(linear.name + ".weight", (out, inn), "dense")
        else:
            for suffix, shape, role in self.method.parameters(out, inn):
                self.add(f"{linear.name}.{suffix}", shape, role)
                if role == "sparse":
                    self.supports.append(Support(out, inn, shape[0]))
            self.kept_width += self.method.saved_width()
            if self.method.composes:
                self.workspace = max(self.workspace, linear.numel)
                shape = f"{out}x{inn}"
                before = self.composed[shape].layers if shape in self.composed else 0
                self.composed[shape] = Composed(before + 1, linear.numel, self.method.rank)
        if linear.bias:
            self.add(linear.name + ".bias", (out,), "norms")


def targeted(name: str, patterns) -> bool:
    """Whether a pattern matches components of the dotted `name`, as methods/convert.py reads `target_modules`."""
    parts = f".{name}."
    return any(f".{pattern}." in parts for pattern in patterns)
