"""Bytes a rank holds right now, by category, and its peak."""

import resource

import torch


def peak_bytes(device: torch.device) -> int:
    """The allocator's peak on CUDA; the process's peak resident set on CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def bytes_by_category(engine) -> dict[str, int]:
    """`weights`, `index`, `states`, `masters` of this rank, and its `peak`, in bytes.

    Counts the tensors the engine holds: sharded weights as their shard, masters where they are not the weights.
    """
    module = engine.module
    weights = {}
    for parameter in module.parameters():
        tensor = getattr(parameter, "ds_tensor", parameter)
        weights[tensor.data_ptr()] = _bytes(tensor)
    index = sum(_bytes(b) for name, b in module.named_buffers() if name.rsplit(".", 1)[-1] in ("S_rows", "S_columns"))
    torch_optimizer = engine.basic_optimizer
    states = sum(
        _bytes(value)
        for state in torch_optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and key != "step" and not key.startswith("qmap")  # the maps are shared by all
    )
    held = getattr(engine.optimizer, "single_partition_of_fp32_groups", None) or getattr(
        engine.optimizer, "fp32_partitioned_groups_flat", []
    )
    masters = sum(_bytes(tensor) for tensor in held if tensor.data_ptr() not in weights)
    return {
        "weights": sum(weights.values()),
        "index": index,
        "states": states,
        "masters": masters,
        "peak": peak_bytes(engine.device),
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
