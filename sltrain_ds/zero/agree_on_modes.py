"""Before the first step: rank 0 chooses how each shape of layer is computed, and all ranks do the same."""

import dataclasses
import os
from collections import Counter

import torch
from deepspeed import comm as dist

from sltrain_ds.config import RunConfig
from sltrain_ds.errors import UserError
from sltrain_ds.memory.estimate import estimate
from sltrain_ds.memory.free import free_bytes
from sltrain_ds.ops import modes


def agree_on_modes(model, run: RunConfig, device) -> RunConfig:
    """Settle `sltrain.op_mode`: the run with {"OUTxIN": mode} where it says "auto", set in the model's layers.

    Rank 0's choice holds: for the run's dtype, the tokens of a micro-batch and the memory left over
    (`sltrain.op_memory`), by the constants of `sltrain.op_constants`. What the config or a layer settles already stays.
    Evaluations go by the same modes, whatever their token counts; without gradients `keep` holds nothing.
    """
    layers, asked = modes.layers(model), run.sltrain.op_mode
    if run.sltrain.method.name != "sltrain" or not layers:
        return run
    if asked != "auto":
        modes.set_op_mode(model, asked)
    sizes = {modes.shape_of(x): (x.out_features, x.in_features, x.rank, x.nnz) for x in layers if x.op_mode == "auto"}
    if not sizes:
        return run
    found = _rank_0s(_choose(sizes, layers, run, device), device)
    if dist.get_rank() == 0:
        print(
            "sltrain_ds computes layers as", ", ".join(f"{shape}: {mode}" for shape, mode in found.items()), flush=True
        )
    for layer in layers:
        if layer.op_mode == "auto":
            layer.op_mode = found[modes.shape_of(layer)]
    settled = (asked if isinstance(asked, dict) else {}) | found
    return dataclasses.replace(run, sltrain=run.sltrain.model_copy(update={"op_mode": settled}))


def _choose(sizes, layers, run, device) -> dict[str, str]:
    tokens = run.micro_batch_size * run.sequence_length
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    constants = modes.load(run.sltrain.op_constants)
    return modes.plan(
        sizes, _alive(layers, run), Counter(map(modes.shape_of, layers)), tokens, dtype, torch.device(device).type,
        1 if run.sltrain.per_layer_update else run.accumulation, constants, _budget(run, device),
    )  # fmt: skip


def _budget(run, device) -> float:
    """Bytes that "keep" may hold on a rank: as the config says, else half of what the estimate leaves free.

    Nothing with per_layer_update, where memory is the point. The model has its weights already, which the estimate
    counts once more: rather too little than too much.
    """
    if run.sltrain.op_memory is not None:
        return run.sltrain.op_memory * 1e9
    if run.sltrain.per_layer_update:
        return 0.0
    try:
        needed = estimate(run).peak
    except UserError:  # of a kind that cannot be counted
        return 0.0
    ranks = 1 if torch.device(device).type == "cuda" else int(os.environ.get("LOCAL_SIZE", run.world_size))
    return max(0.0, free_bytes(device) / ranks - needed) / 2


def _alive(layers, run) -> Counter:
    """Shape -> layers whose W is held at once: all, or under activation checkpointing those of one block."""
    counts = Counter(map(modes.shape_of, layers))
    if run.sltrain.model.activation_checkpointing == "none":
        return counts
    blocks = run.model_fields.get("num_hidden_layers", 1)
    return Counter({shape: -(-count // blocks) for shape, count in counts.items()})


def _rank_0s(own: dict[str, str], device) -> dict[str, str]:
    """Rank 0's choice, on every rank; each brings its own, which may differ where memory or files do."""
    shapes = sorted(own)
    tensor = torch.tensor([modes.CHOICES.index(own[shape]) for shape in shapes], dtype=torch.int64, device=device)
    if dist.get_world_size() > 1:
        dist.broadcast(tensor, 0)
    return {shape: modes.CHOICES[number] for shape, number in zip(shapes, tensor.tolist(), strict=True)}
