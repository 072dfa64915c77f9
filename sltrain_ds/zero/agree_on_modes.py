"""Before the first step: rank 0 chooses how each shape of layer is computed, and all ranks do the same."""

import dataclasses
import os
import time
from collections import Counter

import torch
from deepspeed import comm as dist

from sltrain_ds.config import RunConfig
from sltrain_ds.errors import UserError
from sltrain_ds.memory.estimate import estimate
from sltrain_ds.memory.free import free_bytes
from sltrain_ds.ops import measure_modes, mode_cache, modes
from sltrain_ds.ops.measure_modes import Layer
from sltrain_ds.zero.fake_world import is_fake


def agree_on_modes(model, run: RunConfig, device) -> RunConfig:
    """Settle `sltrain.op_mode`: the run with {"OUTxIN": mode} where it says "auto", set in the model's layers.

    Rank 0's choice holds: from times that it measures, or has measured before, for the run's dtype and the tokens of a
    micro-batch, within the memory left over (`sltrain.op_memory`); with `sltrain.deterministic` by a fixed rule. Modes
    that the config or a layer sets are kept. Evaluations use the same modes, whatever their token counts; without
    gradients `keep` holds nothing.
    """
    layers, asked = modes.layers(model), run.sltrain.op_mode
    if not layers:
        return run
    if asked != "auto":
        modes.set_op_mode(model, asked)
    shapes = {modes.shape_of(layer): layer for layer in layers if layer.op_mode == "auto"}
    if not shapes:
        return run
    found = _rank_0s(shapes, layers, run, device)
    for layer in layers:
        if layer.op_mode == "auto":
            layer.op_mode = found[modes.shape_of(layer)]
    settled = (asked if isinstance(asked, dict) else {}) | found
    return dataclasses.replace(run, sltrain=run.sltrain.model_copy(update={"op_mode": settled}))


def _rank_0s(shapes, layers, run, device) -> dict[str, str]:
    """Rank 0's choice, on every rank; one that is rehearsed alone makes its own, as its rank 0 would."""
    chooses = dist.get_rank() == 0 or is_fake()
    own, how = _choose(shapes, layers, run, device) if chooses else (_by_rule(shapes, run, device), "")
    if chooses:
        by_shape = ", ".join(f"{shape}: {mode}" for shape, mode in sorted(own.items()))
        print(f"sltrain_ds computes layers as {by_shape} ({how})", flush=True)
    names = sorted(own)
    tensor = torch.tensor([modes.CHOICES.index(own[shape]) for shape in names], dtype=torch.int64, device=device)
    if dist.get_world_size() > 1:
        dist.broadcast(tensor, 0)
    return {shape: modes.CHOICES[number] for shape, number in zip(names, tensor.tolist(), strict=True)}


def _choose(shapes, layers, run, device) -> tuple[dict[str, str], str]:
    """(shape -> mode, in words where it comes from)"""
    if run.sltrain.deterministic:
        return _by_rule(shapes, run, device), "by the fixed rule, as sltrain.deterministic asks"
    count = Counter(map(modes.shape_of, layers))
    micro_batches = 1 if run.sltrain.per_layer_update else run.accumulation
    rule, fits, held = _by_rule(shapes, run, device), _memory(count, shapes, run, device), _held(count, shapes, run)
    times, began, measured = {}, time.perf_counter(), 0
    for shape, one in shapes.items():
        keep = fits(rule | {shape: "keep"})
        all_step = micro_batches > 1 and fits(rule | {shape: "keep_step"})
        names = measure_modes.candidates(device, keep, all_step)
        layer = _at_work(one, run, device)
        seconds = mode_cache.find(layer, names)
        if seconds is None:
            measured += 1
            seconds = measure_modes.measure(layer, names)
            mode_cache.keep(layer, seconds)
        times[shape] = measure_modes.of_a_step(seconds, micro_batches)
        if not keep:
            times[shape].pop("keep", None)
    how = f"measured in {time.perf_counter() - began:.1f} s" if measured else f"measured before: {mode_cache.path()}"
    return modes.plan(times, count, held, fits), how


def _by_rule(shapes, run, device) -> dict[str, str]:
    return {
        shape: modes.rule(layer.out_features, layer.in_features, _tokens(run), device)
        for shape, layer in shapes.items()
    }


def _tokens(run) -> int:
    """Of a micro-batch."""
    return run.micro_batch_size * run.sequence_length


def _at_work(layer, run, device) -> Layer:
    return Layer(
        layer.out_features, layer.in_features, layer.rank, layer.nnz, _tokens(run),
        torch.bfloat16 if run.bf16 else torch.float32, str(device), layer.bias is not None,
        run.sltrain.model.activation_checkpointing != "none",
    )  # fmt: skip


def _held(count, shapes, run):
    """(shape, mode) -> bytes of W that its layers hold at once: in "keep" all of them, or under activation
    checkpointing those of one block; in "keep_step" W and dW of all."""
    blocks = 1 if run.sltrain.model.activation_checkpointing == "none" else run.model_fields.get("num_hidden_layers", 1)

    def held(shape, mode):
        layer = shapes[shape]
        weight = layer.out_features * layer.in_features * (2 if run.bf16 else 4)
        return weight * (2 * count[shape] if mode == "keep_step" else -(-count[shape] // blocks))

    return held


def _memory(count, shapes, run, device):
    """shape -> mode -> whether there is memory for it, beside what holds no weights.

    With per_layer_update memory is the point: unless `op_memory` gives room, weights may be held only where that
    leaves the estimated peak as it is (under activation checkpointing the largest moment is often another one).
    """
    if run.sltrain.op_memory is None and run.sltrain.per_layer_update:
        return lambda found: _peak(run, found) <= _peak(run, {s: _let_go(mode) for s, mode in found.items()})
    budget, held = _budget(run, device), _held(count, shapes, run)
    return lambda found: sum(held(s, mode) for s, mode in found.items() if mode in modes.HOLDING) <= budget


def _let_go(mode):
    return "compose" if mode in modes.HOLDING else mode


def _peak(run, found) -> float:
    asked = run.sltrain.op_mode if isinstance(run.sltrain.op_mode, dict) else {}
    block = run.sltrain.model_copy(update={"op_mode": asked | found})
    try:
        return estimate(dataclasses.replace(run, sltrain=block)).peak
    except UserError:  # of a kind that cannot be counted: whatever is held might raise it
        return sum(mode in modes.HOLDING for mode in found.values())


def _budget(run, device) -> float:
    """Bytes that may be held on a rank: as the config says, else half of what the estimate leaves free.

    The model has its weights already, which the estimate counts once more: rather too little than too much.
    """
    if run.sltrain.op_memory is not None:
        return run.sltrain.op_memory * 1e9
    try:
        needed = estimate(run).peak
    except UserError:  # of a kind that cannot be counted
        return 0.0
    ranks = 1 if torch.device(device).type == "cuda" else int(os.environ.get("LOCAL_SIZE", run.world_size))
    return max(0.0, free_bytes(device) / ranks - needed) / 2
