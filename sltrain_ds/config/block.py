"""The `sltrain` block as types. The descriptions feed the JSON Schema and the tables of the docs."""

from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, WithJsonSchema, create_model, model_validator
from pydantic_core import PydanticCustomError

from sltrain_ds.extensions import FORM, is_dotted
from sltrain_ds.formats import INT64, SIZE_LIMIT, STEP_LIMIT
from sltrain_ds.methods import registry
from sltrain_ds.methods.options import Block

from .op_mode import SCHEMA as OP_MODE_SCHEMA
from .op_mode import check_op_mode
from .presets import PRESETS

# transformers.activations' names for what has no parameters of its own
Activation = Literal[
    "silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "leaky_relu",
    "mish", "tanh",
]  # fmt: skip


class LlamaFields(Block):
    """`transformers.LlamaConfig` fields of a model built from scratch."""

    vocab_size: int = Field(ge=2, le=SIZE_LIMIT, description="entries of the vocabulary; the tokenizer's")
    hidden_size: int = Field(ge=1, le=SIZE_LIMIT, description="width of the residual stream")
    intermediate_size: int = Field(ge=1, le=SIZE_LIMIT, description="width of the MLP")
    num_hidden_layers: int = Field(ge=1, le=SIZE_LIMIT, description="transformer blocks")
    num_attention_heads: int = Field(ge=1, le=SIZE_LIMIT, description="attention heads")
    num_key_value_heads: int | None = Field(
        None, ge=1, le=SIZE_LIMIT, description="key and value heads; null: as many as heads"
    )
    head_dim: int | None = Field(None, ge=2, le=SIZE_LIMIT, description="width of a head; null: hidden_size / heads")
    hidden_act: Activation = Field("silu", description="activation of the MLP")
    max_position_embeddings: int = Field(2048, ge=1, le=SIZE_LIMIT, description="longest sequence, in tokens")
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of dense weights at the start")
    rms_norm_eps: float = Field(1e-6, gt=0, description="epsilon of RMSNorm")
    tie_word_embeddings: bool = Field(False, description="the head shares the embedding's weight")
    rope_parameters: dict[str, Any] | None = Field(None, description="rotary embedding, as transformers writes it")
    attention_bias: bool = Field(False, description="biases in the attention projections")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="dropout of attention weights")
    mlp_bias: bool = Field(False, description="biases in the MLP")
    pretraining_tp: int = Field(1, ge=1, le=SIZE_LIMIT, description="unused by transformers 5, kept for older files")
    bos_token_id: int | None = Field(1, ge=0, le=SIZE_LIMIT, description="token that begins a text")
    eos_token_id: int | None = Field(2, ge=0, le=SIZE_LIMIT, description="token that ends a document")
    pad_token_id: int | None = Field(None, ge=0, le=SIZE_LIMIT, description="padding token")
    use_cache: bool = Field(False, description="key-value cache; off in training")


def _llama_fields(value: dict) -> dict:
    return LlamaFields.model_validate(value).model_dump(exclude_unset=True)


class Model(Block):
    """Exactly one of preset, config and path."""

    preset: Literal[tuple(PRESETS)] | None = Field(None, description="a LLaMA by name")
    config: Annotated[dict[str, Any], AfterValidator(_llama_fields)] | None = Field(
        None, description="LlamaConfig fields of a model of your own"
    )
    path: str | None = Field(None, min_length=1, description="a model directory to go on from, dense or converted")
    activation_checkpointing: Literal["none", "reentrant", "non_reentrant"] = Field(
        "none", description="recompute each transformer block in the backward pass"
    )
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa",
        description="PyTorch's fused attention, or its formula; the formula holds all attention weights, and is faster "
        "on a CPU in bf16 for sequences of some hundred tokens",
    )

    @model_validator(mode="after")
    def _one_source(self):
        given = [name for name in ("preset", "config", "path") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise PydanticCustomError(
                "one_source", "needs exactly one of preset, config and path; it has {found}", {"found": found}
            )
        return self


METHODS = {name: method.Options for name, method in registry.METHODS.items()}
Method = Annotated[Union[*METHODS.values()], Field(discriminator="name")]


class Precision(Block):
    """What the optimizer keeps, and in which format."""

    states: Literal["32bit", "8bit", "4bit"] = Field("32bit", description="format of Adam's moments")
    weights: Literal["auto", "fp32", "fp32_master", "bf16", "bf16_stochastic"] = Field(
        "auto",
        description="auto: fp32 without bf16; under bf16 bf16_stochastic with 8- and 4-bit states, else fp32_master; "
        "bf16: no masters, plain rounding (the paper's); bf16_stochastic: no masters, stochastic rounding",
    )
    backend: Literal["auto", "torch", "ours", "bitsandbytes"] = Field(
        "auto", description="whose Adam; auto: ours for 8bit and 4bit, else torch; bitsandbytes: its 8bit"
    )


def _data_dirs(value):
    bad = None
    if isinstance(value, dict):
        bad = next(
            (
                weight
                for weight in value.values()
                if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf")
            ),
            None,
        )
    if not value or bad is not None or not isinstance(value, str | dict):
        raise PydanticCustomError(
            "data_dir", 'must be a prepared directory "DIR", or {"DIR": weight, ...} with positive weights'
        )
    return value if isinstance(value, str) else {name: float(weight) for name, weight in value.items()}


_DIRS_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "object", "minProperties": 1, "additionalProperties": {"type": "number", "exclusiveMinimum": 0}},
    ]
}


class Data(Block):
    """What is read."""

    dir: Annotated[Any, BeforeValidator(_data_dirs), WithJsonSchema(_DIRS_SCHEMA)] = Field(
        description="a prepared directory, or several with their weights in the mixture"
    )
    sequence_length: int = Field(256, ge=2, le=SIZE_LIMIT, description="tokens of a sequence")
    mask_documents: bool = Field(False, description="no attention across document borders")


class Eval(Block):
    """Validation during the run."""

    every: int = Field(1000, ge=1, le=STEP_LIMIT, description="steps between two evaluations")
    tokens: int = Field(
        10_000_000, ge=1, le=STEP_LIMIT, description="budget of validation tokens, the same at any world size"
    )


class CallbackEntry(Block):
    """A callback of the user's: a subclass of `sltrain_ds.training.callbacks.Callback`."""

    name: str = Field(pattern=rf"^{FORM}$", description='the class, as "package.module:Class"')
    options: dict[str, Any] = Field({}, description="keyword arguments that it is made with")


def _callback(value):
    return {"name": value} if isinstance(value, str) else value


class Checkpoint(Block):
    """Checkpoints of the run."""

    dir: str = Field("auto", min_length=1, description="where they go; auto: run_dir/checkpoints")
    every: int = Field(500, ge=1, le=STEP_LIMIT, description="steps between two checkpoints")
    keep: int = Field(3, ge=1, le=STEP_LIMIT, description="the newest so many stay")


class SLTrainBlock(Block):
    """Everything sltrain_ds adds to a DeepSpeed config. Relative paths start at the current directory."""

    model: Model = Field(description="what is trained")
    method: Method = Field(description="how its linear layers are parametrised")
    precision: Precision = Field(Precision(), description="optimizer states and weights")
    per_layer_update: bool = Field(
        False, description="update each layer inside the backward pass and free its gradient (ZeRO 2 and 3)"
    )
    clipping: Literal["global", "per_layer", "lagged"] = Field(
        "global",
        description="what gradient_clipping bounds: the global norm, each layer's norm (per_layer), or the global norm "
        "extrapolated from the layers seen so far (lagged); the last two with per_layer_update",
    )
    op_mode: Annotated[Any, BeforeValidator(check_op_mode), WithJsonSchema(OP_MODE_SCHEMA)] = Field(
        "auto",
        description='how an SLTrain layer computes, for all or by shape {"OUTxIN": mode}; auto: rank 0 measures '
        "what is fastest for each shape (deterministic: a fixed rule), and the run keeps that",
    )
    op_memory: float | None = Field(
        None,
        ge=0,
        description="GB on each rank that auto may spend on holding weights (keep, keep_step); null: half of what "
        "`sltrain-ds estimate` leaves free; with per_layer_update what leaves the estimated peak as it is",
    )
    deterministic: bool = Field(False, description="only deterministic kernels")
    on_nonfinite: Literal["stop"] = Field("stop", description="at a loss or gradient that is not finite")
    norm: Literal["torch", "apex"] = Field("torch", description="RMSNorm of transformers, or NVIDIA apex's fused one")
    loss: Literal["full", "chunked"] = Field("full", description="logits at once, or chunk by chunk (less memory)")
    tokenizer: str = Field(min_length=1, description="tokenizer directory")
    data: Data = Field(description="prepared data")
    steps: int = Field(ge=1, le=STEP_LIMIT, description="optimizer steps of the run")
    seed: int = Field(42, ge=0, le=INT64, description="seed of weights and data order")
    run_dir: str = Field("auto", min_length=1, description="where the run is written; auto: runs/<name of this file>")
    eval: Eval = Field(Eval(), description="validation during the run")
    checkpoint: Checkpoint = Field(Checkpoint(), description="checkpoints")
    callbacks: list[Annotated[CallbackEntry, BeforeValidator(_callback)]] = Field(
        [], description='callbacks of your own, "package.module:Class" or {"name": ..., "options": {...}}'
    )


def block_type(block: dict) -> type[SLTrainBlock]:
    """The type of a block: `SLTrainBlock`, or one whose `method` has the keys of the user's own method.

    Raises `UserError` where `method.name` names a class that cannot be imported.
    """
    method = block.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    if not is_dotted(name):
        return SLTrainBlock
    options = registry.get(name).Options
    return create_model("SLTrainBlock", __base__=SLTrainBlock, method=(options, Field(description="your own method")))


def key_tree(model: type[BaseModel] = SLTrainBlock) -> dict:
    """The block's key names as nested dicts; leaves are None. `method` holds the keys of all methods."""
    nested = {Model: {"config": key_tree(LlamaFields)}} if model is SLTrainBlock else {}
    tree = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if name == "method":
            tree[name] = {}
            for method in METHODS.values():
                for key, child in key_tree(method).items():
                    tree[name][key] = {**(tree[name].get(key) or {}), **child} if child else child
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            tree[name] = {**key_tree(kind), **nested.get(kind, {})}
        else:
            tree[name] = None
    return tree
