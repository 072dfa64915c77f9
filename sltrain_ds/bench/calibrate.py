"""Measures the modes on this machine and fits the constants of the cost model (``ops/modes.py``)."""

import json
import statistics

import torch

from sltrain_ds.bench.op import DTYPES, Shape, build, inputs, one_pass
from sltrain_ds.bench.pairs import interleave
from sltrain_ds.bench.report import describe, environment
from sltrain_ds.ops import modes, support, workspace

# (shape, tokens): small and large, wide and tall, thin and thick factors, so that no two terms grow alike
CPU_GRID = [
    (Shape(256, 256, 64), 1024),
    (Shape(256, 256, 64), 8192),
    (Shape(256, 512, 32, 0.1), 128),
    (Shape(512, 512, 128), 256),
    (Shape(512, 512, 128), 1024),
    (Shape(512, 512, 64, 0.1), 2048),
    (Shape(512, 512, 128), 8192),
    (Shape(1376, 512, 128), 1024),
    (Shape(512, 1376, 256, 0.01), 512),
    (Shape(768, 2048, 256), 256),
    (Shape(1024, 1024, 256), 1024),
    (Shape(1024, 1024, 256), 4096),
    (Shape(1024, 1024, 64, 0.1), 512),
    (Shape(2048, 2048, 512), 128),
    (Shape(2048, 2048, 512), 1024),
    (Shape(2048, 1024, 128, 0.05), 2048),
    (Shape(4096, 2048, 512, 0.05), 256),
]
GPU_GRID = [
    (Shape(out, in_, rank, density), tokens)
    for out, in_, rank, density in ((512, 512, 128, 0.03), (2048, 2048, 512, 0.03), (4096, 4096, 1024, 0.05),
                                    (5461, 2048, 256, 0.1), (4096, 11008, 512, 0.02), (11008, 4096, 1024, 0.05))
    for tokens in (256, 2048, 8192)
]  # fmt: skip


def calibrate(device="cpu", dtypes=tuple(DTYPES), grid=None, rounds=7, seconds=1.0) -> dict:
    """What `modes.load` reads: {"format", "measured": {device type: where}, "constants": {key: seconds}}; what was not
    measured is the built-in file's.

    Every mode at every (shape, tokens) of the grid, forward and backward, interleaved; the fastest of up to `rounds`
    rounds, which end after `seconds` a case. About 15 s a dtype on two CPU cores. Prints how well the fit does.
    """
    device = torch.device(device)
    where = environment(device)
    print(describe(where), flush=True)
    constants, grid = {}, grid or (CPU_GRID if device.type == "cpu" else GPU_GRID)
    sizes = [(*_sizes(shape), tokens) for shape, tokens in grid]
    for dtype in dtypes:
        times = [_times(shape, tokens, DTYPES[dtype], device, rounds, seconds) for shape, tokens in grid]
        place = f"{device.type}.{str(DTYPES[dtype]).removeprefix('torch.')}"
        for mode in times[0]:
            found = modes.fit(mode, sizes, [case[mode] for case in times])
            constants |= {f"{place}.{mode}.{term}": value for term, value in found.items()}
        print(place, _quality(sizes, times, DTYPES[dtype], device.type, constants), sep=": ", flush=True)
    built_in = json.loads(modes.FILE.read_text(encoding="utf-8"))
    where.pop("command")  # it may name a place of this machine, and the file travels
    measured = {**built_in["measured"], device.type: where}
    return {"format": 1, "measured": measured, "constants": {**built_in["constants"], **constants}}


def _quality(sizes, times, dtype, device, constants) -> str:
    """How far the fitted times and the choice are off on what was measured."""
    errors, lost = [], []
    for size, case in zip(sizes, times, strict=True):
        costs = modes.estimate(*size, dtype, device, constants)
        errors += [abs(costs[mode] / seconds - 1) for mode, seconds in case.items()]
        lost.append(case[min(case, key=costs.get)] / min(case.values()))
    return (
        f"{len(sizes)} sizes; the fit is off by {statistics.median(errors):.0%} (median; at most {max(errors):.0%}), "
        f"the mode it chooses takes {max(lost):.2f} of the best one's time at most"
    )


def _sizes(shape):
    return (
        shape.out_features, shape.in_features, shape.rank,
        support.nnz_of(shape.density, shape.out_features, shape.in_features),
    )  # fmt: skip


def _times(shape, tokens, dtype, device, rounds, seconds) -> dict[str, float]:
    """Mode -> seconds; "factored" is left out where it is "factored_dense" by another name."""
    names = [mode for mode in modes.TERMS if device.type == "cpu" or mode != "factored"]
    x, dy = inputs(shape, tokens, device=device, dtype=dtype)
    layers = build(shape, names, device=device, dtype=dtype)
    runs = {name: one_pass(layers[name], x, dy) for name in names}
    found = interleave(runs, rounds, seconds, device, least=2)
    workspace.release()
    return {name: min(times) for name, times in found.items()}
