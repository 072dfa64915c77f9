"""Names of devices, used to store and print measured times."""

import platform
from pathlib import Path

import torch

from sltrain_ds.ops import builder


def device_name(device: str | torch.device) -> str:
    """Model of the GPU (from its driver) or of the processor (from /proc/cpuinfo)."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def instructions(device: str | torch.device) -> str:
    """A GPU's compute capability, or the CPU levels that torch's and our kernels use."""
    device = torch.device(device)
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return f"torch {torch.backends.cpu.get_cpu_capability()}, ops {builder.cpu_level_in_force() or 'reference'}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
