"""`estimate`: parameters and bytes by category per GPU for a config and a number of GPUs, without building the model.

The categories are those of the backward pass, each at its own maximum, so their sum is an upper bound of that peak;
`moments` are the sums while the engine is built, in the backward pass and in `optimizer.step()`. Only tensors are
counted, not allocator fragmentation, the CUDA context or Python. docs/memory.md has the details.
"""

from dataclasses import dataclass, field, replace

from sltrain_ds.memory.activations import activations
from sltrain_ds.memory.count import GROUPS, Model, Shape, count
from sltrain_ds.memory.libraries import cublas_workspaces
from sltrain_ds.memory.paper import RECIPES, Row, table
from sltrain_ds.memory.per_layer import held_per_layer
from sltrain_ds.memory.zero import Settings, held

CATEGORIES = ("weights", "index", "states", "masters", "gradients", "buckets", "activations", "workspace")


@dataclass(frozen=True)
class Estimate:
    """`parameters`: trained numbers by role ("norms": one-dimensional dense ones), `bytes`: per GPU and category
    (CATEGORIES, summing to `total`), `moments`: sums at three moments, `paper`: the paper's rows by method."""

    gpus: int
    zero_stage: int
    tokens: int  # per micro-batch
    parameters: dict[str, int]
    bytes: dict[str, int]
    moments: dict[str, int]
    dense: "Estimate | None" = None
    paper: dict[str, Row] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def peak(self) -> int:
        """The largest of the three moments."""
        return max(self.moments.values())

    def to_json(self) -> dict:
        """JSON data: sizes are bytes per GPU; the keys are stable, and "format" changes with them."""
        out = {
            "format": 1,
            "gpus": self.gpus,
            "zero_stage": self.zero_stage,
            "tokens_per_micro_batch": self.tokens,
            "parameters": {**self.parameters, "total": sum(self.parameters.values())},
            "bytes": {**self.bytes, "total": self.total},
            "moments": {**self.moments, "peak": self.peak},
        }
        if self.dense is not None:
            dense = self.dense.to_json()
            out["dense"] = {key: dense[key] for key in ("parameters", "bytes", "moments")}
        if self.paper:
            out["paper"] = {
                name: {"parameters": row.parameters, "bytes": row.bytes, "parts": row.parts,
                       "printed": {"millions": row.millions, "gigabytes": row.gigabytes}}
                for name, row in self.paper.items()
            }  # fmt: skip
        return out


def estimate(run, gpus: int | None = None, device: str = "cpu") -> Estimate:
    """Estimate a `RunConfig` on `gpus` GPUs (default `run.world_size`), with the dense model under the same config.

    `device`, one of `libraries.KINDS`, selects the memory counted for libraries: none on the CPU.

    Raises `UserError` for models that cannot be counted and settings whose memory is not modelled.
    """
    gpus = run.world_size if gpus is None else gpus
    shape = Shape.of(run.model_fields)
    own = _one(run, gpus, count(shape, run.sltrain.method), device)
    dense = _one(run, gpus, count(shape), device)
    return Estimate(**{**vars(own), "dense": dense, "paper": table(shape, *_recipe(run.sltrain))})


def _one(run, gpus: int, model: Model, device: str) -> Estimate:
    settings, block = Settings.of(run, gpus), run.sltrain
    groups = model.by_group()
    tokens = run.micro_batch_size * block.data.sequence_length
    checkpointing, chunked = block.model.activation_checkpointing != "none", block.loss == "chunked"
    model = _in_mode(model, block)
    in_a_block, in_a_step = (n * settings.weight for n in _held_weights(model, block.op_mode))
    if block.per_layer_update:
        on_gpu, active = held_per_layer(model, settings, tokens, checkpointing, chunked, in_a_block)
    else:
        on_gpu = held(groups, settings)
        active = activations(model, tokens, settings.weight, checkpointing, chunked, in_a_block)
    sizes = {
        "weights": on_gpu.weights,
        "index": sum(support.bytes for support in model.supports),
        "states": on_gpu.states,
        "masters": on_gpu.masters,
        "gradients": on_gpu.gradients,
        "buckets": on_gpu.buckets,
        "activations": active + in_a_step,
        "workspace": model.workspace * settings.weight,
    }
    libraries = cublas_workspaces(device, block.deterministic)
    if libraries:
        sizes["libraries"] = libraries
    kept = on_gpu.weights + sizes["index"] + on_gpu.masters
    moments = {
        "initialize": kept + on_gpu.init,
        "backward": sum(sizes.values()),
        "step": kept + on_gpu.states + sizes["workspace"] + libraries + on_gpu.step,
    }
    parameters = {group: sum(t.numel for t in groups.get(group, ())) for group in GROUPS}
    return Estimate(gpus, run.zero_stage, tokens, parameters, sizes, moments)


def _in_mode(model: Model, block) -> Model:
    """Adds what the modes save: x A^T in the factored ones ("auto" may choose them); weights of eager attention."""
    modes = {shape: _mode(block.op_mode, shape) for shape in model.composed}
    factored = [c for shape, c in model.composed.items() if modes[shape] in ("factored", "factored_dense", "auto")]
    scores = block.data.sequence_length if block.model.attention == "eager" else 0
    return replace(model, kept_width=model.kept_width + sum(c.layers * c.rank for c in factored), scores=scores)


def _held_weights(model: Model, op_mode) -> tuple[int, int]:
    """(elements of W that a block in "keep" holds from forward to backward, elements of W and dW that all layers in
    "keep_step" hold during a step)."""
    in_a_block = in_a_step = 0
    for shape, composed in model.composed.items():
        mode, every = _mode(op_mode, shape), composed.layers * composed.numel
        if mode == "keep":
            in_a_block += every // model.shape.layers
        elif mode == "keep_step":
            in_a_step += 2 * every
    return in_a_block, in_a_step


def _mode(op_mode, shape: str) -> str:
    """Mode of the layers of a shape "OUTxIN"; `op_mode` is one mode for all or {shape: mode}."""
    return op_mode if isinstance(op_mode, str) else op_mode.get(shape, "auto")


def _recipe(block) -> tuple[int | None, float | None]:
    """(rank, density) for the paper's rows: the run's own, else the paper's for its preset."""
    preset = RECIPES.get(block.model.preset, (None, None))
    return tuple(getattr(block.method, key, own) for key, own in zip(("rank", "density"), preset, strict=True))
