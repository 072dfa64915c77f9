"""One layer, forward and backward: dense nn.Linear, the naive operator and every mode, side by side."""

import copy
import math
import re
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
from sltrain_ds.methods import SLTrainLinear
from sltrain_ds.ops import modes as modes_
from sltrain_ds.ops import support, workspace

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = [
    "layer", "tokens", "dtype", "operator", "rounds", "ms", "x naive's speed", "x dense's time",
    "saved MB", "beyond x and parameters", "peak MB",
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A layer to measure."""

    out_features: int
    in_features: int
    rank: int
    density: float = 0.03


def bench(shapes, tokens, dtypes, modes, device, rounds, seconds, out=None) -> list[dict]:
    """Measure every combination; prints the table and returns the cases (see docs/benchmarks.md)."""
    report = Report("op", COLUMNS, device, out)
    for shape in shapes:
        for dtype in dtypes:
            for count in tokens:
                case = measure(shape, count, dtype, device, modes, rounds, seconds)
                report.add(case, table_rows(case))
    return report.cases


def measure(shape: Shape, tokens: int, dtype: str, device, modes, rounds=15, seconds=10.0) -> dict:
    """A case: the shape and, by operator, its `times` (seconds, paired by position) and bytes."""
    x, dy = inputs(shape, tokens, device=device, dtype=DTYPES[dtype])
    layers = build(shape, modes, device=device, dtype=DTYPES[dtype])
    if "auto" in layers:  # one layer, with memory to spare: keep is a choice
        layers["auto"].op_mode = cheapest(shape, tokens, dtype, device)
    passes = {name: one_pass(layer, x, dy) for name, layer in layers.items()}
    times = interleave(passes, rounds, seconds, device)
    operators = {
        name: {"times": times[name], "mode": getattr(layer, "current_mode", None), **_bytes(layer, passes[name], x)}
        for name, layer in layers.items()
    }
    case = {"out": shape.out_features, "in": shape.in_features, "rank": shape.rank, "density": shape.density}
    return {**case, "tokens": tokens, "dtype": dtype, "operators": operators}


def cheapest(shape: Shape, tokens: int, dtype: str, device) -> str:
    """The mode that auto takes where memory does not matter."""
    nnz = support.nnz_of(shape.density, shape.out_features, shape.in_features)
    sizes = (shape.out_features, shape.in_features, shape.rank, nnz, tokens)
    return modes_.choose(*sizes, DTYPES[dtype], torch.device(device).type, keep_bytes=math.inf)


def inputs(shape: Shape, tokens: int, **factory) -> tuple[torch.Tensor, torch.Tensor]:
    """x (tokens, in), which wants its gradient as any hidden layer's does, and dy (tokens, out)."""
    torch.manual_seed(0)
    x = torch.randn(tokens, shape.in_features, **factory, requires_grad=True)
    return x, torch.randn(tokens, shape.out_features, **factory)


def build(shape: Shape, modes, **factory) -> dict[str, nn.Module]:
    """Contender -> layer; all but the dense one hold equal parameters, B no longer zero."""
    sizes = (shape.in_features, shape.out_features)
    ours = SLTrainLinear(*sizes, rank=shape.rank, density=shape.density, alpha=shape.rank, **factory)
    nn.init.normal_(ours.B, std=shape.rank**-0.5)
    layers = {"dense": nn.Linear(*sizes, bias=False, **factory), "naive": to_naive(copy.deepcopy(ours))}
    for mode in modes:
        layers[mode] = copy.deepcopy(ours)
        layers[mode].op_mode = mode
    return layers


def table_rows(case: dict) -> list[list]:
    """A row an operator: median ms, its speed in the naive one's, its time in the dense one's, MB."""
    operators, rows = case["operators"], []
    naive, dense = operators["naive"]["times"], operators["dense"]["times"]
    ones = [1.0] * len(naive)
    for name, found in operators.items():
        times = found["times"]
        if name == "auto":
            name += f": {found['mode']}"
        rows.append([
            f"{case['out']}x{case['in']} r{case['rank']} d{case['density']:g}", case["tokens"], case["dtype"], name,
            len(times), 1e3 * ratio(times, ones), ratio(naive, times), ratio(times, dense),
            *(megabytes(found[key]) for key in ("saved", "saved_beyond", "peak")),
        ])  # fmt: skip
    return rows


def parse_shapes(text: str, density: float | None = None) -> list[Shape]:
    """Shapes of "60m,7b" (the distinct projections of a preset at the paper's rank and density) and of
    "OUTxIN:rRANK[:dDENSITY]"; `density` replaces all of theirs.
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
    """A call that does a forward and backward."""
    wanted = [x, *layer.parameters()]
    # gradients are made anew in every pass, as in training after zero_grad(set_to_none=True)
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def _bytes(layer, run, x) -> dict[str, int]:
    saved, beyond = saved_bytes(lambda: layer(x), [x, *layer.parameters(), *layer.buffers()])
    workspace.release()  # so that what an operator takes of it counts as its own
    with Meter(x.device) as meter:
        run()
    return {"saved": saved, "saved_beyond": beyond, "peak": meter.peak, "workspace": workspace.nbytes()}
