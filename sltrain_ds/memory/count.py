"""Every parameter of a LLaMA-class model under a method, from its config alone: no torch, no model."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from sltrain_ds.config.presets import PRESETS
from sltrain_ds.errors import UserError

GROUPS = ("factors", "sparse", "dense", "norms")  # the optimizer's groups, in its order
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Tensor:
    """A trainable tensor: dotted name, shape and the optimizer group it steps in."""

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
    """The fixed support of one layer, row-wise: int32 row pointers, uint16 columns (int32 where in > 65,536)."""

    out_features: int
    in_features: int
    nnz: int

    @property
    def bytes(self) -> int:
        return 4 * (self.out_features + 1) + (2 if self.in_features <= 65_536 else 4) * self.nnz


def nonzeros(density: float, out_features: int, in_features: int) -> int:
    """Non-zeros of a support: exactly int(density * out * in)."""
    return int(density * out_features * in_features)


@dataclass(frozen=True)
class Shape:
    """What a LLaMA-class config says about sizes, defaults of `transformers.LlamaConfig` filled in."""

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
            raise UserError(f'sltrain.model: cannot count a "{kind}" model without building it; '
                            f"known: {', '.join(_LLAMA_LIKE)}")
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


def model_fields(block) -> dict:
    """LlamaConfig fields of a `sltrain.model` block: a preset's, its own `config`, or its directory's config.json."""
    if block.preset is not None:
        if block.preset not in PRESETS:
            raise UserError(f'sltrain.model.preset: no preset "{block.preset}"; known: {", ".join(PRESETS)}')
        return PRESETS[block.preset]
    if block.config is not None:
        return dict(block.config)
    file = Path(block.path) / "config.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"sltrain.model.path: cannot read {file} ({error}); give a Hugging Face model directory") from None


# What each method puts in place of a targeted W (out x in): (suffix, shape, role) of its parameters, in their order.
def _sltrain(out, inn, method):
    nnz = nonzeros(method.density, out, inn)
    return [("A", (method.rank, inn), "factors"), ("B", (out, method.rank), "factors"), ("S_values", (nnz,), "sparse")]


def _low_rank(out, inn, method):
    return [("A", (method.rank, inn), "factors"), ("B", (out, method.rank), "factors")]


REPLACEMENTS = {"sltrain": _sltrain, "low_rank": _low_rank, "full_rank": None}


@dataclass(frozen=True)
class Model:
    """The counted model: its tensors in `named_parameters()` order, supports, projections replaced and left dense."""

    shape: Shape
    tensors: tuple[Tensor, ...]
    supports: tuple[Support, ...]
    replaced: tuple[Linear, ...]
    rank: int

    @property
    def parameters(self) -> int:
        return sum(t.numel for t in self.tensors)

    def by_group(self) -> dict[str, list[Tensor]]:
        """Tensors of each optimizer group, empty groups left out."""
        groups = {group: [t for t in self.tensors if t.group == group] for group in GROUPS}
        return {group: tensors for group, tensors in groups.items() if tensors}


def count(shape: Shape, method=None) -> Model:
    """The model of `shape` with `method` (a `sltrain.method` block) in its targeted projections; None is full-rank."""
    name = method.name if method is not None else "full_rank"
    if name not in REPLACEMENTS:
        raise UserError(f'sltrain.method.name: cannot count "{name}"; known: {", ".join(REPLACEMENTS)}')
    replace = REPLACEMENTS[name]
    tensors, supports, replaced = [Tensor("model.embed_tokens.weight", (shape.vocab, shape.hidden), "dense")], [], []
    for layer in range(shape.layers):
        for linear in shape.linears(layer):
            if replace is not None and targeted(linear.name, method.target_modules):
                replaced.append(linear)
                for suffix, dims, role in replace(linear.out_features, linear.in_features, method):
                    tensors.append(Tensor(f"{linear.name}.{suffix}", dims, role))
                    if role == "sparse":
                        supports.append(Support(linear.out_features, linear.in_features, dims[0]))
            else:
                tensors.append(Tensor(f"{linear.name}.weight", (linear.out_features, linear.in_features), "dense"))
            if linear.bias:
                tensors.append(Tensor(f"{linear.name}.bias", (linear.out_features,), "norms"))
            if shape.qk_norm and linear.name.endswith("o_proj"):
                tensors += [Tensor(linear.name.replace("o_proj", f"{x}_norm.weight"), (shape.head_dim,), "norms")
                            for x in "qk"]
        tensors += [Tensor(f"model.layers.{layer}.{norm}_layernorm.weight", (shape.hidden,), "norms")
                    for norm in ("input", "post_attention")]
    tensors.append(Tensor("model.norm.weight", (shape.hidden,), "norms"))
    if not shape.tied:
        tensors.append(Tensor("lm_head.weight", (shape.vocab, shape.hidden), "dense"))
    return Model(shape, tuple(tensors), tuple(supports), tuple(replaced), getattr(method, "rank", 0) if replaced else 0)


def targeted(name: str, patterns) -> bool:
    """Whether a pattern names a part of the dotted `name`, as `methods.convert` reads `target_modules`."""
    parts = f".{name}."
    return any(f".{pattern}." in parts for pattern in patterns)
