"""Memory that can still be had."""

from pathlib import Path

import torch


def free_bytes(device) -> int:
    """Bytes free on the device: of the GPU, or of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
