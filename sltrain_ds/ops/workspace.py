"""Scratch matrices, one per (device, dtype, stream), shared by all layers: allocating W each time costs 10-22 ms of
page faults at 7B shapes.

With the C++ ops csrc/workspace.cpp owns them, since csrc/layer.cpp uses them too; otherwise a dict here does.
"""

import torch

from sltrain_ds.ops import builder

_buffers: dict[tuple, torch.Tensor] = {}  # without the C++ ops


def take(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A (rows, columns) view of the shared scratch, uninitialized; valid until the next ``take`` for the same key."""
    if builder.load():
        return torch.ops.sltrain.workspace_take(rows, columns, dtype, device)
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    key = (device, dtype, stream)
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < rows * columns:
        _buffers.pop(key, None)  # free the smaller buffer before allocating the larger one
        buffer = _buffers[key] = torch.empty(rows * columns, dtype=dtype, device=device)
    return buffer[: rows * columns].view(rows, columns)


def buffers() -> list[torch.Tensor]:
    """All workspaces as flat tensors."""
    return list(torch.ops.sltrain.workspace_buffers() if _native() else _buffers.values())


def nbytes() -> int:
    """Bytes held in workspaces."""
    return sum(buffer.numel() * buffer.element_size() for buffer in buffers())


def release() -> None:
    """Free all workspaces; the next forward allocates them again."""
    _buffers.clear()
    if _native():
        torch.ops.sltrain.workspace_release()


def _native():
    """Whether the C++ ops are loaded; these functions never trigger a build."""
    return builder.loaded()
