"""Benchmark of one layer's forward and backward: dense nn.Linear, the naive operator and every mode."""

import copy
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from sltrain_ds.bench.meter import Meter, saved_bytes
from sltrain_ds.bench.naive import to_naive
from sltrain_ds.bench.pairs import interleave, ratio
from sltrain_ds.bench.report import Report, megabytes
from sltrain_ds.config.presets import PRESETS
from sltrain_ds.errors import UserError
from sltrain_ds.memory.paper import RECIPES
from sltrain_ds.methods.sltrain_layer import SLTrainLinear
from sltrain_ds.ops import measure_modes, support, workspace
from sltrain_ds.ops import modes as modes_
from sltrain_ds.ops.measure_modes import Layer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = [
    "layer", "tokens", "dtype", "operator", "rounds", "ms", "x naive's speed", "x dense's time", "x best mode",
    "saved MB", "beyond x and parameters", "peak MB",
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer to measure."""

    out_features: int
    in_features: int
    rank: int
    density: float = 0.03


def bench(shapes, tokens, dtypes, modes, device, rounds, seconds, out=None) -> list[dict]:
    """Measure every combination; print the table and return the cases (see docs/benchmarks.md)."""
    report = Report("op", COLUMNS, device, out)
    for shape in shapes:
        for dtype in dtypes:
            for count in tokens:
                case = measure(shape, count, dtype, device, modes, rounds, seconds)
                report.add(case, table_rows(case))
    return report.cases


def measure(shape: Shape, tokens: int, dtype: str, device, modes, rounds=15, seconds=10.0) -> dict:
    """One case: the shape and, per operator, its `times` (seconds, paired by position) and bytes."""
    x, dy = inputs(shape, tokens, device=device, dtype=DTYPES[dtype])
    layers = build(shape, modes, device=device, dtype=DTYPES[dtype])
    chosen_in = None
    if "auto" in layers:
        layers["auto"].op_mode, chosen_in = fastest(shape, tokens, dtype, device)
    passes = {name: one_pass(layer, x, dy) for name, layer in layers.items()}
    times = interleave(passes, rounds, seconds, device)
    operators = {
        name: {"times": times[name], "mode": getattr(layer, "current_mode", None), **_bytes(layer, passes[name], x)}
        for name, layer in layers.items()
    }
    if chosen_in is not None:
        operators["auto"]["chosen_in"] = chosen_in
    case = {"out": shape.out_features, "in": shape.in_features, "rank": shape.rank, "density": shape.density}
    return {**case, "tokens": tokens, "dtype": dtype, "operators": operators}


def fastest(shape: Shape, tokens: int, dtype: str, device) -> tuple[str, float]:
    """The mode that auto chooses without a memory limit, and the seconds of that measurement (not cached).

    For one micro-batch without activation checkpointing.
    """
    nnz = support.nnz_of(shape.density, shape.out_features, shape.in_features)
    began = time.perf_counter()
    layer = Layer(
        shape.out_features, shape.in_features, shape.rank, nnz, tokens, dtype=DTYPES[dtype], device=str(device)
    )
    times = measure_modes.measure(layer, measure_modes.candidates(device, keep=True))
    one = {"it": 1}
    mode = modes_.plan({"it": times}, one, lambda *_: 1, lambda _: True)["it"]
    return mode, time.perf_counter() - began


def inputs(shape: Shape, tokens: int, **factory) -> tuple[torch.Tensor, torch.Tensor]:
    """x (tokens, in), which requires grad like a hidden layer's input, and dy (tokens, out)."""
    torch.manual_seed(0)
    x = torch.randn(tokens, shape.in_features, **factory, requires_grad=True)
    return x, torch.randn(tokens, shape.out_features, **factory)


def build(shape: Shape, modes, **factory) -> dict[str, nn.Module]:
    """{contender: layer}. All but the dense layer have equal parameters; B is drawn at random, not zero."""
    sizes = (shape.in_features, shape.out_features)
    ours = SLTrainLinear(*sizes, rank=shape.rank, density=shape.density, alpha=shape.rank, **factory)
    nn.init.normal_(ours.B, std=shape.rank**-0.5)
    layers = {"dense": nn.Linear(*sizes, bias=False, **factory), "naive": to_naive(copy.deepcopy(ours))}
    for mode in modes:
        layers[mode] = copy.deepcopy(ours)
        layers[mode].op_mode = mode
    return layers


def table_rows(case: dict) -> list[list]:
    """One row per operator: median ms, speed relative to naive, time relative to dense and to the best mode, MB.

    For auto, the time relative to the best mode is that of the chosen mode's row, if the table has it.
    """
    operators, rows = case["operators"], []
    naive, dense = operators["naive"]["times"], operators["dense"]["times"]
    ones = [1.0] * len(naive)
    of_modes = {name: found["times"] for name, found in operators.items() if name in modes_.MODES}
    best = min(of_modes.values(), key=statistics.median, default=None)
    for name, found in operators.items():
        times = found["times"]
        own = of_modes.get(found["mode"] if name == "auto" else name, times if name == "auto" else None)
        if name == "auto":
            name += f": {found['mode']}"
        rows.append([
            f"{case['out']}x{case['in']} r{case['rank']} d{case['density']:g}", case["tokens"], case["dtype"], name,
            len(times), 1e3 * ratio(times, ones), ratio(naive, times), ratio(times, dense),
            None if best is None or own is None else ratio(own, best),
            *(megabytes(found[key]) for key in ("saved", "saved_beyond", "peak")),
        ])  # fmt: skip
    return rows


def parse_shapes(text: str, density: float | None = None) -> list[Shape]:
    """Parse a list of presets, such as "60m,7b" (a preset's distinct projections at the paper's rank and density), and
    of "OUTxIN:rRANK[:dDENSITY]"; `density` overrides every shape's.
    """
    shapes = [shape for item in text.split(",") for shape in _parse_shape(item.strip())]
    if density is not None:
        shapes = [replace(shape, density=density) for shape in shapes]
    for shape in shapes:
        if not 0 < shape.density <= 1:
            raise UserError(f"--density {shape.density}: must be above 0 and at most 1 (d of --shapes too)")
    return list(dict.fromkeys(shapes))


def _parse_shape(item) -> Iterator[Shape]:
    preset = f"llama_{item.lower()}"
    if preset in RECIPES:
        hidden, inner = PRESETS[preset]["hidden_size"], PRESETS[preset]["intermediate_size"]
        return (Shape(*sizes, *RECIPES[preset]) for sizes in ((hidden, hidden), (inner, hidden), (hidden, inner)))
    found = re.fullmatch(r"(\d+)x(\d+):r(\d+)(?::d([\d.]+))?", item)
    if not found:
        names = ", ".join(name.removeprefix("llama_") for name in RECIPES)
        raise UserError(f"--shapes {item}: must be like 512x512:r128:d0.03 (out x in, rank, density) or one of {names}")
    sizes = [int(number) for number in found.groups()[:3]]
    if not 1 <= sizes[2] <= min(sizes[:2]):
        raise UserError(f"--shapes {item}: the rank must be from 1 to min(out, in) = {min(sizes[:2])}")
    return iter([Shape(*sizes) if found[4] is None else Shape(*sizes, float(found[4]))])


def one_pass(layer, x, dy):
    """A function that does one forward and backward."""
    wanted = [x, *layer.parameters()]
    # every pass allocates its gradients, as in training after zero_grad(set_to_none=True)
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def _bytes(layer, run, x) -> dict[str, int]:
    saved, beyond = saved_bytes(lambda: layer(x), [x, *layer.parameters(), *layer.buffers()])
    workspace.release()  # so that an operator's workspace counts in its peak
    with Meter(x.device) as meter:
        run()
    return {"saved": saved, "saved_beyond": beyond, "peak": meter.peak, "workspace": workspace.nbytes()}
