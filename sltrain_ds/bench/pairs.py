"""Time several things side by side, in rounds: what slows the machine for a while slows all of a round alike.

What is compared is the median, over the rounds, of the ratio of two times of the same round.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch

from sltrain_ds.ops import timing

CUDA_BURST = 0.02  # seconds: short of it, what starts and ends a measurement counts


def interleave(
    runs: dict[str, Callable[[], object]],
    rounds: int = 15,
    seconds: float = 10.0,
    device: str | torch.device = "cpu",
    least: int = 3,
    burst: float = 0.002,
) -> dict[str, list[float]]:
    """Seconds of a call of each run, a list of equal length for each: one time a round, every round runs them all.

    Rounds end at `rounds`, or after `seconds` but not before `least`. Each run is called twice before (the first call
    allocates, the second tells how many calls make a measurement of about `burst` seconds). On CUDA that is
    CUDA_BURST or more, and told by a burst of its own: a lone call is mostly waiting. The order turns by one place a
    round, so that nobody always follows the same neighbour.
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
    """Median of the ratios of paired times."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
