"""Benchmark of the 8-bit Adam step: ours, bitsandbytes', torch's fused 32-bit AdamW, and a plain copy."""

import importlib.util
import statistics

import torch

from sltrain_ds.bench.op import DTYPES
from sltrain_ds.bench.pairs import interleave, ratio
from sltrain_ds.bench.report import Report
from sltrain_ds.ops.adam8bit import BLOCK, adam8bit_step_, new_states

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
COLUMNS = [
    "elements", "dtype", "optimizer", "ms", "M elements/s", "x bitsandbytes' speed", "x fused AdamW's speed",
    "bytes an element", "GB/s", "of a copy's",
]  # fmt: skip


def bench(numels, dtypes, device, rounds, seconds, out=None) -> list[dict]:
    """Measure every size and dtype; print the table and return the cases (see docs/benchmarks.md)."""
    report = Report("adam8bit", COLUMNS, device, out)
    for dtype in dtypes:
        for numel in numels:
            case = measure(numel, dtype, device, rounds, seconds)
            report.add(case, table_rows(case))
    return report.cases


def measure(numel: int, dtype: str, device, rounds=15, seconds=10.0) -> dict:
    """One case: per contender its `times` (seconds per step, paired by position) and the `bytes` a step must move."""
    steps = _steps(numel, DTYPES[dtype], device)
    times = interleave({name: step for name, (step, _) in steps.items()}, rounds, seconds, device)
    contenders = {name: {"times": times[name], "bytes": moved} for name, (_, moved) in steps.items()}
    return {"numel": numel, "dtype": dtype, "contenders": contenders}


def table_rows(case: dict) -> list[list]:
    """One row per contender; GB are 1e9 bytes."""
    rows, found = [], case["contenders"]
    copied = found["copy"]
    for name, one in found.items():
        median = statistics.median(one["times"])
        others = (found.get(other) for other in ("bitsandbytes", "fused AdamW"))
        speeds = [ratio(other["times"], one["times"]) if other and name != "copy" else None for other in others]
        share = ratio(copied["times"], one["times"]) * one["bytes"] / copied["bytes"]
        rows.append([
            case["numel"], case["dtype"], name, 1e3 * median, case["numel"] / median / 1e6, *speeds,
            one["bytes"] / case["numel"], one["bytes"] / median / 1e9, share,
        ])  # fmt: skip
    return rows


def _steps(numel, dtype, device):
    """{contender: (function that does one step, bytes it must read and write)}."""
    size = torch.empty((), dtype=dtype).element_size()
    states = 2 * 2 * (numel + 4 * -(-numel // BLOCK))  # two moments and their absmax, read and written
    steps = {"ours": (_ours(numel, dtype, device, False), 3 * size * numel + states)}
    if dtype == torch.bfloat16:
        steps["ours, stochastic"] = (_ours(numel, dtype, device, True), 3 * size * numel + states)
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        steps["bitsandbytes"] = (
            _torch_like(bitsandbytes.optim.AdamW8bit, numel, dtype, device),
            3 * size * numel + states,
        )
    # torch keeps its moments in the parameter's dtype
    steps["fused AdamW"] = (_torch_like(torch.optim.AdamW, numel, dtype, device, fused=True), 7 * size * numel)
    source, target = _random(numel, dtype, device), torch.empty(numel, dtype=dtype, device=device)
    steps["copy"] = (lambda: target.copy_(source), 2 * size * numel)
    return steps


def _random(numel, dtype, device):
    return torch.randn(numel, device=device, generator=torch.Generator(device).manual_seed(0)).mul_(1e-2).to(dtype)


def _ours(numel, dtype, device, stochastic):
    p, g = _random(numel, dtype, device), _random(numel, dtype, device)
    states, done = new_states(p), [0]

    def step():
        done[0] += 1
        adam8bit_step_(p, g, *states, step=done[0], stochastic=stochastic, **SETTINGS)

    return step


def _torch_like(kind, numel, dtype, device, **options):
    p = torch.nn.Parameter(_random(numel, dtype, device))
    p.grad = _random(numel, dtype, device)
    return kind([p], **SETTINGS, **options).step
