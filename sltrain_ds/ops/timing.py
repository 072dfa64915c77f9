"""Wall-clock seconds of a call on a device."""

import time
from collections.abc import Callable

import torch


def seconds(run: Callable[[], object], calls: int = 1, device: str | torch.device = "cpu") -> float:
    """Mean seconds per call of `run` over `calls` consecutive calls; a GPU is synchronised before and after."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return (time.perf_counter() - began) / calls


def _wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
