"""Memory of the per-layer update (zero/per_layer/update.py) on one GPU, in bytes.

Gradients exist for one unit at a time (a transformer block, the embedding, or final norm and head). The backward pass
can therefore peak in a few places; the categories are those of the largest one:

    head        the layers' inputs, the loss, the head's gradient
    last block  the layers' inputs, the block's recomputed tensors and its MLP's temporaries, or the block's gradients
    embedding   its gradient, with nothing else left

One rank: gradients are only `.grad`. N ranks: a bucket of the unit (N partitions) and the gradient being copied into
it; a parameter alone in its group is reduced in place. Accumulation adds the partial sum, w P/N (one rank: it is
`.grad`). Masters of the weights' dtype are the weights; for others a group's gradients are cast when it is stepped.
"""

from dataclasses import dataclass

from sltrain_ds.memory import activations as act
from sltrain_ds.memory import zero
from sltrain_ds.memory.count import GROUPS, Model


@dataclass(frozen=True)
class Unit:
    """One unit. `parts`: elements of each group's partition; `gradients`, `bucket`: their bytes when the last gradient
    arrives; `cast`: bytes of the largest group's gradients in the masters' dtype, if it differs."""

    groups: dict[str, list]
    parts: dict[str, int]
    gradients: int
    bucket: int
    cast: int


def held_per_layer(model: Model, s: zero.Settings, tokens: int, checkpointing: bool, chunked: bool, of_W: int = 0):
    """(`zero.Held`, activations) in bytes, gradients and activations at the peak of the backward pass.

    `of_W`: bytes of W that a block keeps from forward to backward (op_mode "keep").
    """
    units = {name: _unit(groups, s) for name, groups in _by_unit(model).items()}
    parts = sum(sum(unit.parts.values()) for unit in units.values())
    sharded = parts if s.stage == 3 else parts * s.world
    largest = max(sum(unit.parts.values()) for unit in units.values()) * (1 if s.stage == 3 else s.world)
    whole, gathered = (0, 0) if s.stage != 3 else zero.gathered(model.tensors, s)
    accumulated = parts * s.weight if s.accumulation > 1 else 0
    gradients, bucket, activations = _largest_place(model, units, s, tokens, checkpointing, chunked, of_W)
    if s.accumulation > 1 and s.world == 1:  # autograd adds into the gradient counted already
        gradients = max(t.numel for t in model.tensors) * s.weight
    held = zero.Held(
        weights=(sharded + whole) * s.weight,
        masters=0 if s.master == s.weight else parts * s.master,
        states=sum(_states(unit, s) for unit in units.values()),
        gradients=gradients + accumulated,
        buckets=bucket + gathered * s.weight,
        step=accumulated,
        init=max(
            (2 if s.stage != 3 or s.world > 1 else 1) * largest * s.weight,
            zero.built(model.tensors, s) if s.stage == 3 else 0,
        ),
    )
    return held, activations


def _by_unit(model: Model) -> dict[str, dict[str, list]]:
    """{unit: {group: tensors}}, split as in zero/per_layer/units.py."""
    units: dict[str, dict[str, list]] = {}
    for tensor in model.tensors:
        parts = tensor.name.split(".")
        name = parts[2] if parts[1] == "layers" else "embedding" if parts[1] == "embed_tokens" else "head"
        units.setdefault(name, {}).setdefault(tensor.group, []).append(tensor)
    return {name: {group: groups[group] for group in GROUPS if group in groups} for name, groups in units.items()}


def _unit(groups: dict[str, list], s: zero.Settings) -> Unit:
    if s.stage == 3:
        parts = {group: sum(zero.shard(t.numel, s) for t in tensors) for group, tensors in groups.items()}
    else:
        parts = {group: zero.flat_numel(tensors, s) // s.world for group, tensors in groups.items()}
    tensors = [t for members in groups.values() for t in members]
    if s.world == 1:
        gradients, bucket = sum(t.numel for t in tensors), 0
    else:
        alone = [members[0].numel for members in groups.values() if len(members) == 1]
        copied = [t.numel for members in groups.values() if len(members) > 1 for t in members]
        bucket = sum(part * s.world for group, part in parts.items() if len(groups[group]) > 1)
        gradients = sum(alone) + max(copied, default=0)
    cast = max(parts.values()) * s.master if s.master != s.weight else 0
    return Unit(groups, parts, gradients * s.weight, bucket * s.weight, cast)


def _states(unit: Unit, s: zero.Settings) -> int:
    total = 0
    for group, tensors in unit.groups.items():
        if s.stage == 3:
            pieces = [min(t.numel, zero.shard(t.numel, s)) for t in tensors]
        else:
            pieces = zero.pieces(tensors, unit.parts[group], s)
        total += sum(zero.states(n, s, group, [n]) for n in pieces)
    return total


def _largest_place(model, units, s, tokens, checkpointing, chunked, of_W) -> tuple[int, int, int]:
    """(gradients, bucket, activations) at the place where their sum is largest."""
    shape, c = model.shape, s.weight
    stream = c * tokens * shape.hidden
    block = act.block(model, tokens, c) + of_W
    inputs = shape.layers * (stream if checkpointing else block)
    block *= checkpointing  # recomputed tensors
    loss = act.loss(shape, tokens, c, chunked)
    blocks = [unit for name, unit in units.items() if name not in ("head", "embedding")]
    largest = max(blocks, key=lambda unit: unit.gradients + unit.bucket)
    # the block's backward starts with the MLP's temporary gradients; at its end only parameter gradients remain
    passing = c * tokens * 2 * (shape.intermediate + shape.hidden)
    first = [t.numel for ts in largest.groups.values() for t in ts if ".down_proj." in t.name]
    head, embedding = units["head"], units["embedding"]
    places = [
        (head.gradients, head.bucket, inputs + act.head(shape, tokens, c) + loss),
        (s.weight * max(first, default=0), largest.bucket, inputs + block + passing),
        (largest.gradients + largest.cast, largest.bucket, inputs + block // 2),
        (head.gradients + head.cast, head.bucket, inputs + stream),
        (embedding.gradients + embedding.cast, embedding.bucket, 2 * stream),
    ]
    return max(places, key=sum)
