"""Current and peak bytes of tensors on a device."""

import resource
from pathlib import Path

import torch

from sltrain_ds.ops import builder


class Gauge:
    """Current (`now()`) and peak (`most()`) bytes of a device's tensors since the gauge was created.

    CUDA: the caching allocator's active bytes, including freed blocks still in use by another stream. CPU: bytes of our
    counting allocator (csrc/counted_allocator.cpp), active from here on; earlier tensors are not counted. Without the
    C++ ops, the growth of the resident set size, read only at the calls (`kind` "resident"): a peak between two calls
    is missed, and libraries count.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.kind = "allocator"
            torch.cuda.reset_peak_memory_stats(self.device)
        elif builder.load():
            self.kind = "allocator"
            torch.ops.sltrain.count_cpu_bytes()
            torch.ops.sltrain.cpu_bytes(True)
        else:
            self.kind = "resident"
            self._start, self._most = resident()[0], 0

    def now(self) -> int:
        return self._read(False)[0]

    def most(self, reset: bool = False) -> int:
        """Peak since the last reset; `reset` restarts it from the current bytes."""
        return self._read(reset)[1]

    def reserved(self) -> int | None:
        """CUDA: peak bytes reserved by the caching allocator since the last reset; else None."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None

    def _read(self, reset: bool) -> tuple[int, int]:
        if self.kind == "resident":
            now = max(0, resident()[0] - self._start)
            most = self._most = max(now, self._most)
            self._most = now if reset else most
        elif self.device.type == "cuda":
            stats = torch.cuda.memory_stats(self.device)
            now, most = (stats.get(f"active_bytes.all.{which}", 0) for which in ("current", "peak"))
            if reset:
                torch.cuda.reset_peak_memory_stats(self.device)
        else:
            now, most = torch.ops.sltrain.cpu_bytes(reset)
        return now, most


def resident() -> tuple[int, int]:
    """(resident set size, its peak) of this process in bytes: VmRSS and VmHWM of /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        return int(fields["VmRSS"]) * 1024, int(fields["VmHWM"]) * 1024
    except (OSError, KeyError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB; may include a parent's peak
        return most, most
