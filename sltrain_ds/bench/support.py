"""Benchmark of the support: drawing it, scattering S into W and gathering dW, relative to a plain copy's bandwidth."""

import statistics
import time

import torch

from sltrain_ds.bench.op import DTYPES
from sltrain_ds.bench.pairs import interleave, ratio
from sltrain_ds.bench.report import Report, megabytes
from sltrain_ds.config.presets import PRESETS
from sltrain_ds.config.shapes import linear_shapes
from sltrain_ds.errors import UserError
from sltrain_ds.memory.paper import RECIPES
from sltrain_ds.methods.sltrain_layer import SLTrainLinear
from sltrain_ds.ops import sparse, support

COLUMNS = ["layer", "dtype", "operator", "non-zeros", "ms", "ns a non-zero", "MB to touch", "GB/s", "of a copy's"]
# smallest unit of memory transfer, in bytes; a GPU's caches request 32, its memory may transfer 64
SECTORS = {"cpu": (64,), "cuda": (32, 64)}
BEYOND_CACHES = 2.5e8  # total bytes of the Ws used in turn, so that none stays in a cache


def bench(shapes, dtypes, device, rounds, seconds, out=None) -> list[dict]:
    """Measure every shape and dtype; print the table and return the cases (see docs/benchmarks.md)."""
    report = Report("support", COLUMNS, device, out)
    for shape in shapes:
        for dtype in dtypes:
            case = measure(shape, dtype, device, rounds, seconds)
            report.add(case, table_rows(case))
    return report.cases


def measure(shape, dtype: str, device, rounds=15, seconds=10.0) -> dict:
    """One case: per operator its `times` (seconds per call, paired by position) and the `bytes` it must touch."""
    out, in_, kind = shape.out_features, shape.in_features, DTYPES[dtype]
    nnz = support.nnz_of(shape.density, out, in_)
    rows, columns = (part.to(device) for part in support.sample(out, in_, nnz, 0, "bench"))
    values = torch.ones(nnz, dtype=kind, device=device)
    size = out * in_ * kind.itemsize
    weights = [torch.zeros(out, in_, dtype=kind, device=device) for _ in range(max(2, round(BEYOND_CACHES / size)))]

    def scatter():
        for W in weights:
            sparse.scatter_add_(W, rows, columns, values)

    def gather():
        for W in weights:
            sparse.gather(W, rows, columns, out=values)

    def copy():
        for W, other in zip(weights, weights[1:] + weights[:1], strict=True):
            W.copy_(other)

    runs = {"scatter": scatter, "gather": gather, "copy of W": copy}
    if torch.device(device).type == "cpu":
        runs["draw"] = lambda: support.sample(out, in_, nnz, 0, "bench")
    times = interleave(runs, rounds, seconds, device)
    index = sum(part.numel() * part.element_size() for part in (rows, columns))
    first, *others = SECTORS[torch.device(device).type]
    moved = {"copy of W": 2 * size}
    for sector in (first, *others):
        touched = sectors_touched(rows, columns, in_, kind.itemsize, sector)
        for name, passes in (("scatter", 2), ("gather", 1)):
            moved[_by(name, sector, first)] = passes * touched + index + nnz * kind.itemsize
    operators = {}
    for name, found in times.items():
        calls = len(weights) if name in moved else 1
        each = [t / calls for t in found]
        operators[name] = {"times": each, "bytes": moved.get(name)}
        for sector in others:
            if (label := _by(name, sector, first)) in moved:
                operators[label] = {"times": each, "bytes": moved[label]}
    return {"out": out, "in": in_, "density": shape.density, "nnz": nnz, "dtype": dtype, "operators": operators}


def _by(name, sector, first):
    return name if sector == first else f"{name}, {sector}-byte sectors"


def sectors_touched(rows, columns, in_features: int, itemsize: int, sector: int) -> int:
    """Bytes of W's sectors that contain a position of the support, for W aligned to a sector."""
    positions = support.to_flat_index(rows, columns, in_features)  # ascending
    hit = torch.div(positions * itemsize, sector, rounding_mode="floor")
    return sector * torch.unique_consecutive(hit).numel()


def table_rows(case: dict) -> list[list]:
    """One row per operator; GB are 1e9 bytes."""
    found, rows = case["operators"], []
    copied = found["copy of W"]
    for name, one in found.items():
        median, rate, share = statistics.median(one["times"]), None, None
        if one["bytes"]:
            rate = one["bytes"] / median / 1e9
            share = ratio(copied["times"], one["times"]) * one["bytes"] / copied["bytes"]
        each = None if name == "copy of W" or not case["nnz"] else 1e9 * median / case["nnz"]
        rows.append([
            f"{case['out']}x{case['in']} d{case['density']:g}", case["dtype"], name, case["nnz"], 1e3 * median, each,
            megabytes(one["bytes"]), rate, share,
        ])  # fmt: skip
    return rows


def draw_model(name: str) -> dict:
    """Draw all supports of a preset as its layers do before their first use, with checksums; no other part of the
    model is allocated. Prints and returns {"positions", "seconds", "layers"}.
    """
    preset = f"llama_{name.lower()}"
    if preset not in RECIPES:
        raise UserError(f"--model {name}: must be one of {', '.join(key.removeprefix('llama_') for key in RECIPES)}")
    rank, density = RECIPES[preset]
    fields, layers = PRESETS[preset], []
    for block in range(fields["num_hidden_layers"]):
        for place, (out, in_) in linear_shapes(fields).items():
            if place != "lm_head":
                own = {"layer_name": place.replace(".0.", f".{block}."), "device": "meta"}
                layers.append(SLTrainLinear(in_, out, rank=rank, density=density, alpha=1, **own))
    began = time.perf_counter()
    for layer in layers:
        for part in ("S_rows", "S_columns"):
            layer._buffers[part] = torch.empty_like(layer._buffers[part], device="cpu")
        layer.ensure_support()
    found = {"positions": sum(x.nnz for x in layers), "seconds": time.perf_counter() - began, "layers": len(layers)}
    print(
        f"{preset}: {found['positions']:,} positions of {found['layers']} layers drawn and checksummed in "
        f"{found['seconds']:.2f} s, {torch.get_num_threads()} threads"
    )
    return found
