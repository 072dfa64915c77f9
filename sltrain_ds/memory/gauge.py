"""How many bytes of tensors are alive on a device, and how many were at most."""

import resource
from pathlib import Path

import torch

from sltrain_ds.ops import builder


class Gauge:
    """`now()` and `most()` of a device's tensors since the gauge was made, in bytes.

    CUDA: the caching allocator's active bytes, those of freed blocks that another stream still uses included. CPU:
    those of our counting allocator (csrc/counted_allocator.cpp), which serves from here on; tensors made before are not
    seen. Where the C++ ops could not be built, the resident set's growth, read at the calls alone (`kind` "resident"):
    a peak between two calls is missed, and libraries count.
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
        """The most alive at once since the last reset; `reset` starts anew from what is alive now."""
        return self._read(reset)[1]

    def reserved(self) -> int | None:
        """CUDA: the most bytes that the caching allocator took from the device since the last reset; else None."""
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
    """(resident set now, its peak) of this process, in bytes; VmRSS and VmHWM of /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        return int(fields["VmRSS"]) * 1024, int(fields["VmHWM"]) * 1024
    except (OSError, KeyError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB; a parent's peak may stay in it
        return most, most
