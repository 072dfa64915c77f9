"""The tensors a live engine holds at this moment, by category."""

import torch

from sltrain_ds.methods.layer import MethodLinear

CATEGORIES = ("weights", "index", "states", "masters", "gradients", "buckets")


def held_bytes(engine) -> dict[str, int]:
    """Bytes of CATEGORIES on this rank, every storage counted once, in the first category that has it.

    Sharded weights count as their shard and what stays gathered; what ZeRO-3 has gathered for a while is `buckets`.
    Walks over all tensors of the engine (DeepSpeed 0.19: stage_1_and_2.py, stage3.py).
    """
    seen, found = set(), dict.fromkeys(CATEGORIES, 0)
    for category, tensors in _tensors(engine):
        for tensor in _flat(tensors):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[category] += storage.nbytes()
    return found


def _tensors(engine):
    """(category, tensors): what aliases the weights (masters without a copy of their own) comes after them."""
    module, zero = engine.module, engine.optimizer
    parameters = list(module.parameters())
    sharded = [p for p in parameters if hasattr(p, "ds_tensor")]
    passing = {id(p) for p in sharded if not p.ds_persist}
    yield "weights", [p.ds_tensor for p in sharded]
    yield "weights", [p.data for p in parameters if id(p) not in passing]
    yield "buckets", [p.data for p in parameters if id(p) in passing]
    layers = [layer for layer in module.modules() if isinstance(layer, MethodLinear)]
    yield "index", [getattr(layer, name) for layer in layers for name in layer.index]
    masters = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat")
    yield "masters", [getattr(zero, name, None) for name in masters]
    yield "states", [_moments(state) for state in engine.basic_optimizer.state.values()]
    # gradients may be views of a bucket
    yield "buckets", [bucket.buffer for bucket in getattr(zero, "ipg_buckets", {}).values()]
    yield "buckets", [unit.bucket for unit in getattr(zero, "units", ())]
    held = ("averaged_gradients", "grad_partitions_flat_buffer", "reduced")
    yield "gradients", [p.grad for p in parameters]
    yield "gradients", [getattr(zero, name, None) for name in held]


def _moments(state):
    # the maps of 8-bit codes are shared by all, step counters are four bytes
    return [value for key, value in state.items() if key != "step" and not key.startswith("qmap")]


def _flat(value):
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _flat(one)
