"""One scratch matrix for each (device, dtype, stream), shared by all layers: a fresh W costs 10-22 ms of page faults
at 7B shapes.

csrc/workspace.cpp holds them where the C++ ops serve, since csrc/layer.cpp takes them too; else a dict here.
"""

import torch

from sltrain_ds.ops import builder

_buffers: dict[tuple, torch.Tensor] = {}  # without the C++ ops


def take(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A (rows, columns) view of the shared scratch, contents undefined; valid until the next ``take`` of its kind."""
    if builder.load():
        return torch.ops.sltrain.workspace_take(rows, columns, dtype, device)
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    key = (device, dtype, stream)
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < rows * columns:
        _buffers.pop(key, None)  # let the smaller one go before the larger one is made
        buffer = _buffers[key] = torch.empty(rows * columns, dtype=dtype, device=device)
    return buffer[: rows * columns].view(rows, columns)


def buffers() -> list[torch.Tensor]:
    """All workspaces, flat."""
    return list(torch.ops.sltrain.workspace_buffers() if _native() else _buffers.values())


def nbytes() -> int:
    """Bytes held in workspaces."""
    return sum(buffer.numel() * buffer.element_size() for buffer in buffers())


def release() -> None:
    """Give all workspaces back; the next forward makes them again."""
    _buffers.clear()
    if _native():
        torch.ops.sltrain.workspace_release()


def _native():
    """Whether the C++ ops are loaded; nothing here is a reason to build them."""
    return builder.loaded()
