"""The name under which a device's measured times are kept and shown."""

import platform
from pathlib import Path

import torch

from sltrain_ds.ops import builder


def device_name(device: str | torch.device) -> str:
    """The GPU's or the processor's model, as its driver or /proc/cpuinfo gives it."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def instructions(device: str | torch.device) -> str:
    """What the kernels use of it: a GPU's compute capability, or the vector instructions of torch's and of our own."""
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
