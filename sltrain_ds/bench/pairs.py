"""Timing of several functions in interleaved rounds, so that temporary slowdowns affect all of a round alike.

Two functions are compared by the median over the rounds of the ratio of their times in the same round.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch

from sltrain_ds.ops import timing

CUDA_BURST = 0.02  # seconds; in shorter bursts, the start and end of a measurement distort it


def interleave(
    runs: dict[str, Callable[[], object]],
    rounds: int = 15,
    seconds: float = 10.0,
    device: str | torch.device = "cpu",
    least: int = 3,
    burst: float = 0.002,
) -> dict[str, list[float]]:
    """Seconds per call of each run, as lists of equal length: one time per round, every round measures all runs.

    Measuring ends after `rounds` rounds, or after `seconds` but not before `least` rounds. Each run is called twice
    beforehand: the first call allocates, the second determines how many calls take about `burst` seconds. On CUDA
    `burst` is at least CUDA_BURST, and the count is refined by one more burst, since a single call is mostly waiting.
    The order rotates by one position per round.
    """
    calls, cuda = {}, torch.device(device).type == "cuda"
    if cuda:
        burst = max(burst, CUDA_BURST)
    for name, run in runs.items():
        timing.seconds(run, 1, device)
        calls[name] = 1
        for _ in range(1 + cuda):
            calls[name] = max(1, math.ceil(burst / max(timing.seconds(run, calls[name], device), 1e-9)))
    names, times = list(runs), {name: [] for name in runs}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - began > seconds:
            break
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(timing.seconds(runs[name], calls[name], device))
    return times


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median ratio of paired times."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
