"""Meters for peak tensor bytes and for the bytes that autograd saves for the backward pass."""

import gc

import torch
from torch.autograd.profiler import profile, record_function

_MARK = "sltrain bench mark"


class Meter:
    """Context manager that measures the peak of allocated tensor bytes above those allocated at entry.

    CUDA: the caching allocator's peak. CPU: allocations and releases of torch's allocator, as recorded by the profiler.
    These include custom ops' tensors, but not direct malloc calls of libraries nor releases of tensors allocated before
    entry. `mark()` restarts the peak from that point; `peak` is set on exit.
    """

    def __init__(self, device: str | torch.device):
        self.device, self.peak = torch.device(device), 0

    def __enter__(self):
        gc.collect()
        if self.device.type == "cuda":
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._profile = profile(use_kineto=True, profile_memory=True).__enter__()
        self.mark()
        return self

    def mark(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with record_function(_MARK):
                pass

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._profile.__exit__(*error)
        if error[0] is None:
            events = sorted(self._profile.kineto_results.events(), key=lambda event: event.start_ns())
            self.peak = peak_since_mark((event.name(), event.nbytes()) for event in events)


def peak_since_mark(events) -> int:
    """Peak sum of allocations (+) and releases (-) after the last mark; events are (name, bytes) in time order."""
    now = peak = 0
    for name, nbytes in events:
        if name == _MARK:
            peak = now
        elif name == "[memory]":
            now += nbytes
            peak = max(peak, now)
    return peak


def saved_bytes(forward, given) -> tuple[int, int]:
    """(bytes that `forward()` saves for its backward pass, those of them outside the tensors `given`).

    Each storage counts once and in full, since a view keeps its whole storage alive.
    """
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # kept alive until counted, so that no storage is reused
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    del kept
    return sum(storages.values()), sum(size for place, size in storages.items() if place not in known)
