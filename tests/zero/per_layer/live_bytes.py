"""Counts the bytes of all tensors alive, as torch's operators make them and Python drops them."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Inside: `live` bytes of all storages made inside and of those given at the start, and their `peak` since `mark`.

    Meta tensors count nothing.
    """

    def __init__(self, *start: torch.Tensor):
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakValueDictionary()
        for tensor in start:
            self._count(tensor)

    def mark(self) -> int:
        """Forget the peak so far; returns `live`."""
        self.peak = self.live
        return self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._count(value)
        return result

    def _count(self, tensor):
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen and storage.nbytes():
            self._seen[storage._cdata] = storage
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size):
        self.live -= size
