"""Bytes that DeepSpeed 0.19.8 allocates on one GPU for a list of parameter groups, per ZeRO stage.

Derived from runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py and engine.py of that version. `weights`,
`masters` and `states` are exact (a test compares them with a live engine at every stage); `gradients` and `buckets`
are the code's peak allocations. docs/memory.md gives the formulas.
"""

from dataclasses import dataclass
from math import ceil

from sltrain_ds.errors import UserError
from sltrain_ds.formats import ALIGNMENT, STATES

DEEPSPEED_ALIGNMENT = 2  # elements per rank: nccl_start_alignment_factor, stage_1_and_2.py
BITSANDBYTES_FLOOR = 4096  # bitsandbytes keeps 32-bit states for smaller tensors
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Settings:
    """The relevant config keys with DeepSpeed's defaults. Sizes in elements, dtypes as bytes per element."""

    stage: int
    world: int
    weight: int  # bytes of a weight
    master: int  # bytes of a master
    accumulate: int  # bytes of an accumulated gradient
    states: str  # "32bit", "8bit" or "4bit"
    ours: bool  # partitions of zero/aligned.py, states of optim/blockwise_adam.py
    accumulation: int
    reduce_bucket: int
    overlap: bool
    contiguous: bool
    parameter_alignment: bool
    sub_group: int
    persistence: int
    model_persistence: int
    prefetch: int
    max_live: int
    max_reuse: int

    @classmethod
    def of(cls, run, world: int) -> "Settings":
        """Settings of a `RunConfig`. Raises `UserError` for options whose memory is not modelled."""
        ds = run.deepspeed
        zero = ds.get("zero_optimization", {})
        if zero.get("zero_quantized_weights"):
            raise UserError("zero_optimization.zero_quantized_weights: not estimated; remove the key")
        if zero.get("mics_shard_size", -1) > 0:
            raise UserError("zero_optimization.mics_shard_size: not estimated; remove the key")
        if zero.get("zero_hpz_partition_size", 1) > 1:
            raise UserError("zero_optimization.zero_hpz_partition_size: not estimated; set it to 1")

        def number(key, default):
            value = zero.get("stage3_" + key, zero.get(key, default))
            return default if value in (None, "auto") else int(value)

        weight = 2 if run.bf16 else 4
        accumulate = (ds.get("data_types") or {}).get("grad_accum_dtype")
        overlap = zero.get("overlap_comm")
        return cls(
            stage=run.zero_stage,
            world=world,
            weight=weight,
            master=2 if run.weights in ("bf16", "bf16_stochastic") else 4,
            accumulate=_BYTES[accumulate] if accumulate else weight,
            states=run.sltrain.precision.states,
            ours=run.sltrain.precision.backend == "ours",
            accumulation=run.accumulation,
            reduce_bucket=number("reduce_bucket_size", 500_000_000),
            overlap=run.zero_stage == 3 if overlap is None else overlap,  # zero/config.py:384
            contiguous=zero.get("contiguous_gradients", True),
            parameter_alignment=zero.get("parameter_alignment", False),
            sub_group=number("sub_group_size", 1_000_000_000),
            persistence=number("param_persistence_threshold", 100_000),
            model_persistence=number("model_persistence_threshold", 2**63),
            prefetch=number("prefetch_bucket_size", 50_000_000),
            max_live=number("max_live_parameters", 1_000_000_000),
            max_reuse=number("max_reuse_distance", 1_000_000_000),
        )


@dataclass(frozen=True)
class Held:
    """Bytes on one GPU. `gradients` and `buckets`: their maximum in the backward pass; `step`: both, and copies, in
    `optimizer.step()`; `init`: the same while the engine is built."""

    weights: int
    masters: int
    states: int
    gradients: int
    buckets: int
    step: int
    init: int


def held(groups: dict[str, list], s: Settings) -> Held:
    """Bytes for `groups`: optimizer group name -> tensors (`count.Tensor`), in the optimizer's order."""
    return {0: _stage_0, 1: _stage_1_and_2, 2: _stage_1_and_2, 3: _stage_3}[s.stage](groups, s)


def states(numel: int, s: Settings, group: str, pieces: list[int]) -> int:
    """Bytes of both Adam moments of a stepped tensor; `pieces` are the lengths of the parameters' parts in it. Without
    step counters (4 bytes) and the shared 8-bit maps."""
    if s.states == "32bit":
        return 2 * numel * s.master
    if group == "norms" or (not s.ours and numel < BITSANDBYTES_FLOOR):
        return 2 * numel * 4
    block, per_byte = STATES[s.states]
    if s.ours:  # every piece starts a new block
        blocks = sum(ceil(length / block) for length in pieces)
        return 2 * (blocks * block // per_byte + 4 * blocks)
    return 2 * (numel + 4 * ceil(numel / block))


def _stage_0(groups, s):
    tensors = [(t, group) for group, members in groups.items() for t in members]
    total = sum(t.numel for t, _ in tensors)
    mixed = s.weight != 4  # a low-precision model gets fp32 copies; an fp32 model is stepped in place
    gradients = total * s.weight
    return Held(
        weights=total * s.weight,
        masters=total * 4 if mixed else 0,
        states=sum(states(t.numel, s, group, [t.numel]) for t, group in tensors),
        gradients=gradients,
        buckets=min(total, 500_000_000) * s.weight,  # flattened copy for the all-reduce, engine.py:3073
        step=gradients + (total * 4 if mixed else 0),
        init=0,
    )


def _stage_1_and_2(groups, s):
    if s.stage == 1 and s.accumulate != s.weight:
        raise UserError(
            "data_types.grad_accum_dtype: at stage 1 it selects another DeepSpeed optimizer, which is not "
            "estimated; remove the key or use stage 2"
        )
    flat = {group: flat_numel(tensors, s) for group, tensors in groups.items()}
    parts = {group: numel // s.world for group, numel in flat.items()}
    total = sum(t.numel for tensors in groups.values() for t in tensors)
    largest = max(t.numel for tensors in groups.values() for t in tensors)
    if s.accumulate != s.weight:
        owned = sum(parts.values()) * s.accumulate  # one flat buffer for the partition (:1267)
        rounds = 1
    else:
        owned = _owned(groups, parts, s) * s.weight  # whole tensors that touch the partition (:2177)
        rounds = 2 if s.stage == 2 and s.accumulation > 1 else 1  # accumulated and new micro-batch gradients
    # stage 1 keeps every gradient until the boundary, stage 2 only the one being copied into the bucket
    waiting = (total if s.stage == 1 else largest) * s.weight
    bucket = s.reduce_bucket if s.contiguous else 0
    filled = min(s.reduce_bucket, total)
    # a group's gradients are flattened, then cast to the master's dtype; a single or flat one needs no flat copy
    flat_copy = {g: n * s.weight * (len(groups[g]) > 1 and s.accumulate == s.weight) for g, n in parts.items()}
    cast_copy = {g: n * s.master * (s.master != s.accumulate) for g, n in parts.items()}
    flattening = max(numel * s.weight for numel in flat.values())
    zero_gradients = sum(parts.values()) * s.master
    return Held(
        weights=sum(flat.values()) * s.weight,
        masters=sum(parts.values()) * s.master,
        states=sum(states(numel, s, group, pieces(groups[group], numel, s)) for group, numel in parts.items()),
        gradients=owned * rounds + waiting,
        buckets=(bucket * (2 if s.overlap else 1) + filled) * s.weight,  # filled: flat copy for the all-reduce
        step=owned + max(flat_copy[g] + cast_copy[g] for g in parts),
        init=max(flattening, zero_gradients),
    )


def flat_numel(tensors, s) -> int:
    """Elements of a group's flat buffer: the tensors, padding between them if configured, and the aligned end."""
    unit = _unit(s)
    numel = sum(ceil(t.numel / unit) * unit for t in tensors[:-1]) + tensors[-1].numel
    step = (ALIGNMENT if s.ours else DEEPSPEED_ALIGNMENT) * s.world
    return ceil(numel / step) * step


def _unit(s) -> int:
    """Alignment of a parameter's offset in a flat buffer, in elements."""
    return ALIGNMENT if s.ours else 16 // s.weight if s.parameter_alignment else 1


def pieces(tensors, part, s) -> list[int]:
    """Lengths of the tensors' pieces in the first rank's partition of `part` elements; no rank has more."""
    found, offset = [], 0
    for tensor in tensors:
        if offset < part:
            found.append(min(tensor.numel, part - offset))
        offset += ceil(tensor.numel / _unit(s)) * _unit(s)
    return found


def _owned(groups, parts, s) -> int:
    """Elements of the tensors that overlap a rank's partition, for the rank with the most."""
    by_rank = [0] * s.world
    for group, tensors in groups.items():
        offset = 0
        for tensor in tensors:
            first, last = offset // parts[group], (offset + tensor.numel - 1) // parts[group]
            for rank in range(first, last + 1):
                by_rank[rank] += tensor.numel
            offset += tensor.numel
    return max(by_rank)


def _stage_3(groups, s):
    shards = {group: [shard(t.numel, s) for t in tensors] for group, tensors in groups.items()}
    sharded = sum(map(sum, shards.values()))
    stepped = [  # group, elements, and the pieces of parameters in them, without padding
        (
            group,
            sum(sizes[span]),
            [min(t.numel, size) for t, size in zip(groups[group][span], sizes[span], strict=True)],
        )
        for group, sizes in shards.items()
        for span in _sub_groups(sizes, s.sub_group)
    ]
    tensors = [t for members in groups.values() for t in members]
    total, largest = sum(t.numel for t in tensors), max(t.numel for t in tensors)
    persistent_held, passing = gathered(tensors, s)
    reduce_input = min(s.reduce_bucket, total)
    bucket = (s.reduce_bucket if s.contiguous else 0) + reduce_input
    gradients = sharded * s.accumulate
    biggest = max(numel for _, numel, _ in stepped)
    cast_copy = biggest * s.master if s.master != s.accumulate else 0
    held_buckets = (s.reduce_bucket if s.contiguous else 0) * s.weight
    return Held(
        weights=(sharded + persistent_held) * s.weight,
        masters=sharded * s.master,
        states=sum(states(numel, s, group, pieces) for group, numel, pieces in stepped),
        gradients=gradients + largest * s.weight,
        buckets=(bucket + passing) * s.weight,
        step=held_buckets + gradients + biggest * s.accumulate + cast_copy,
        init=max(
            built(tensors, s),
            largest * s.weight + max(sharded * s.weight, biggest * s.master, held_buckets + gradients),
        ),
    )


def built(tensors, s) -> int:
    """Bytes in addition to the shards while ZeRO-3 builds the largest parameter: unsharded, in fp32, then cast."""
    return max(t.numel for t in tensors) * (4 + (s.weight if s.weight != 4 else 0))


def shard(numel: int, s) -> int:
    """Elements of a parameter's shard on one rank under ZeRO-3, with padding."""
    unit = ALIGNMENT if s.ours and s.world > 1 else 1
    return ceil(numel / (unit * s.world)) * unit


def gathered(tensors, s) -> tuple[int, int]:
    """(elements gathered permanently under ZeRO-3, elements gathered temporarily).

    Every module's start prefetches up to one more bucket, so prefetching runs ahead up to max_live; a bucket is copied
    out of its communication buffer (partition_parameters.py, AllGatherCoalescedHandle).
    """
    if s.world == 1:  # a gathered parameter is its shard (partition_parameters.py, _no_gather_coalesced)
        return 0, 0
    persistent = held = 0
    for tensor in tensors:
        if tensor.numel <= s.persistence and persistent + tensor.numel <= s.model_persistence:
            persistent += tensor.numel
            held += shard(tensor.numel, s) * s.world  # gathered with the padding of its shards
    total, largest = sum(t.numel for t in tensors), max(t.numel for t in tensors)
    ahead = s.max_live if s.prefetch else max(s.max_reuse, 2 * largest)
    live = min(total - persistent, s.max_live, ahead)
    return held, live + min(s.prefetch, live)


def _sub_groups(sizes, limit) -> list[slice]:
    """Spans of a group's tensors that are stepped together (stage3.py, _create_fp16_sub_groups)."""
    if limit >= sum(sizes):
        return [slice(len(sizes))]
    spans, first = [], 0
    for position in range(len(sizes)):
        if sum(sizes[first : position + 1]) >= limit or position == len(sizes) - 1:
            spans.append(slice(first, position + 1))
            first = position + 1
    return spans
