"""Free memory of a device."""

from pathlib import Path

import torch


def free_bytes(device) -> int:
    """Free bytes of the GPU, or of the machine for the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
