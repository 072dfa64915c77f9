"""Measurement of the modes on this machine: one layer's forward and backward, modes interleaved in rounds.

If whole passes would take too long, parts of the layer are timed and scaled along dimensions in which cost is linear:

    compose, keep               a slice of W's rows at `few` tokens (almost only the cost of W), times out / rows; plus
                                the three products with W ("held", below) at `many` tokens, times out / rows and
                                tokens / many
    factored, factored_dense    whole layers at `few` and at `many` tokens, extrapolated linearly

"held" is a micro-batch within a step in mode "keep_step": W exists already, and dW is accumulated. The mean time of n
micro-batches in "keep_step" is therefore that of "held" plus 1/n of the difference between "keep" and "held".
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sltrain_ds.ops import keep_step, sltrain_linear, spmm, support, timing, workspace

SECONDS = 0.8  # approximate time budget per layer
ROUNDS = 50  # maximum, after one warm-up round
BURST = 0.002  # minimum seconds per measurement
CACHE, COPIES = 16 << 20, 8  # bytes of a layer's alternating copies; their maximum number
CLEARLY = (3.0, 1.5)  # a mode is clearly slower beyond this ratio to the best: after the warm-up, after later rounds
SHORT = 0.05  # fraction of the budget below which a warm-up time excludes no mode, since first calls allocate
_SPARSE = 8  # rough cost of a sparse operation in dense ones; used only to decide whether to measure slices


@dataclass(frozen=True)
class Layer:
    """Sizes and setting of a layer. `recomputed`: under activation checkpointing, so that its forward runs twice."""

    out_features: int
    in_features: int
    rank: int
    nnz: int
    tokens: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    bias: bool = False
    recomputed: bool = False


def candidates(device, keep: bool = False, held: bool = False) -> list[str]:
    """Names to measure on the device; `keep` and `held` include the modes that hold weights."""
    sparse = ["factored"] if spmm.available(torch.device(device)) else []  # otherwise it is the same as factored_dense
    return [*sparse, "compose", "factored_dense", *["keep"] * (keep or held), *["held"] * held]


def measure(layer: Layer, names: list[str], seconds: float = SECONDS, timer=timing.seconds) -> dict[str, float]:
    """Seconds of a forward and backward by name; `names` are those of `candidates`.

    A mode that is clearly slower than the best is dropped early, so its time is approximate. Releases all memory and
    does not change torch's random state.
    """
    try:
        with torch.enable_grad():
            tiny = replace(layer, out_features=8, in_features=8, rank=1, nnz=8, tokens=8)
            for name in names:  # excludes one-time costs of the process, such as loading libraries
                _pass(_Copies(tiny), name, 8, 8, 1)()
            return race(*_parts(layer, names, _rate(layer, timer), seconds), seconds, layer.device, timer)
    finally:
        workspace.release()
        if torch.device(layer.device).type == "cuda":
            torch.cuda.empty_cache()


def of_a_step(times: dict[str, float], micro_batches: int) -> dict[str, float]:
    """{mode: seconds per micro-batch} from the result of `measure`; "held" becomes "keep_step"."""
    found = {mode: seconds for mode, seconds in times.items() if mode != "held"}
    if "held" in times and micro_batches > 1:
        more = max(0.0, times["keep"] - times["held"])
        found["keep_step"] = times["held"] + more / micro_batches
    return found


def race(
    runs: dict[str, Callable],
    sums: dict[str, dict[str, float]],
    seconds: float = SECONDS,
    device: str | torch.device = "cpu",
    timer: Callable[[Callable, int, object], float] = timing.seconds,
) -> dict[str, float]:
    """{name: seconds}: the weighted sum of its parts' minimum times; `sums` is {name: {part of `runs`: weight}}.

    Each round times every part once, in an order rotated by one position. Rounds end after `seconds` (at least one
    runs), or when one mode is left. A mode clearly slower than the best drops out, and with it the parts that no other
    mode needs. `timer(run, calls, device)` returns the seconds of one call.
    """
    fewest, calls, spent, left = {}, dict.fromkeys(runs, 1), 0.0, list(sums)

    def total(name):  # noise can make the line's slope negative, but no mode takes less than one of its parts
        least = max(fewest[part] for part, count in sums[name].items() if count > 0)
        return max(least, sum(count * fewest[part] for part, count in sums[name].items()))

    for number in range(ROUNDS + 1):
        parts = [part for part in runs if any(part in sums[name] for name in left)]
        if number and spent + sum(fewest[part] * calls[part] for part in parts) > seconds:
            break
        turn = number % len(parts)
        for part in parts[turn:] + parts[:turn]:
            took = timer(runs[part], calls[part], device)
            spent += took * calls[part]
            fewest[part] = min(took, fewest.get(part, math.inf))
        if number == 0:  # the first call allocates
            calls = {part: max(1, math.ceil(BURST / max(fewest[part], 1e-9))) for part in parts}
        limit = CLEARLY[number > 0] * min(total(name) for name in left if name != "held")
        if number == 0:
            limit = max(limit, SHORT * seconds)
        left = [name for name in left if total(name) <= limit]
        if sum(name != "held" for name in left) < 2:
            break
    return {name: total(name) for name in sums}


def _parts(layer, names, rate, seconds):
    """({part: function}, {name: {part: weight}}) for passes that together take about `seconds` at most."""
    tokens, out, copies = layer.tokens, layer.out_features, _Copies(layer)
    forwards = 1 + layer.recomputed
    if sum(_operations(layer, name) for name in names) / rate <= seconds / 3:
        runs = {name: _pass(copies, name, out, tokens, forwards) for name in names}
        return runs, {name: {name: 1.0} for name in names}
    whole = [name for name in names if name.startswith("factored")]
    of_W = [name for name in names if name not in whole]
    many = _largest(256, tokens, lambda n: sum(_operations(layer, m, tokens=n) for m in whole) <= rate * seconds / 3)
    few = max(1, many // 8)
    rows = _largest(1024, out, lambda n: sum(_operations(layer, m, n, few) for m in of_W) <= rate * seconds / 12)
    runs, sums = {}, {}
    for name in whole:
        slope = (tokens - few) / max(1, many - few)
        runs |= {f"{name} {count}": _pass(copies, name, out, count, forwards) for count in (few, many)}
        sums[name] = {f"{name} {many}": slope, f"{name} {few}": 1 - slope} if many > few else {f"{name} {few}": 1.0}
    if of_W:
        runs["held"] = _pass(copies, "held", rows, many, forwards)
    for name in of_W:
        sums[name] = {"held": out / rows * (tokens - (name != "held") * few) / many}
        if name != "held":
            runs[name] = _pass(copies, name, rows, few, forwards)
            sums[name][name] = out / rows
    return runs, sums


def _largest(most: int, there: int, fits) -> int:
    """The first of `most`, `most` / 2, ... 2 that fits, limited to `there`."""
    while most > 2 and not fits(min(most, there)):
        most //= 2
    return min(most, there)


def _operations(layer, name, rows=None, tokens=None) -> float:
    """Operations of a forward and backward; those of sparse products are weighted by _SPARSE."""
    out, in_, rank = rows or layer.out_features, layer.in_features, layer.rank
    tokens = tokens or layer.tokens
    with_W, through_factors = 6 * tokens * out * in_, 6 * tokens * rank * (out + in_)
    return {
        "compose": with_W + 8 * rank * out * in_,
        "keep": with_W + 6 * rank * out * in_,
        "held": with_W,
        "factored": through_factors + _SPARSE * 6 * tokens * layer.nnz,
        "factored_dense": with_W + through_factors,
    }[name]


def _rate(layer, timer) -> float:
    """Operations per second of a dense product that is large enough to take 5 ms."""
    side, rate = 128, 0.0
    factory = {"dtype": layer.dtype, "device": layer.device}
    while side <= 2048:
        a = _filled((side, side), **factory)
        b, out = _filled((side, side), **factory), torch.empty(side, side, **factory)
        taken = min(timer(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 1, layer.device) for _ in range(2))
        rate = max(rate, 2 * side**3 / max(taken, 1e-9))
        if taken > 5e-3:
            break
        side *= 2
    return rate


class _Copies:
    """Tensors of a layer's passes, shared by all modes.

    As in a model, consecutive calls use different tensors: calls cycle through several copies, so that together they
    exceed the caches.
    """

    def __init__(self, layer: Layer):
        self.layer, self._drawn = layer, {}

    def of(self, rows: int, tokens: int) -> list[tuple]:
        """(arguments of `linear` up to the bias, dy) for the first `rows` rows of W and `tokens` tokens."""
        if (rows, tokens) not in self._drawn:
            numbers = (rows + self.layer.in_features) * (2 * tokens + self.layer.rank)
            count = max(1, min(COPIES, CACHE // (numbers * self.layer.dtype.itemsize)))
            self._drawn[rows, tokens] = [self._draw(rows, tokens) for _ in range(count)]
        return self._drawn[rows, tokens]

    def _draw(self, rows, tokens):
        layer = self.layer
        factory = {"dtype": layer.dtype, "device": layer.device}
        in_, rank, nnz = layer.in_features, layer.rank, layer.nnz * rows // layer.out_features
        pointers, columns = (t.to(layer.device) for t in support.sample(rows, in_, nnz, 0, "measured"))
        A, B = _filled((rank, in_), **factory).requires_grad_(), _filled((rows, rank), **factory).requires_grad_()
        values = _filled((nnz,), **factory).requires_grad_()
        bias = _filled((rows,), **factory).requires_grad_() if layer.bias else None
        x = _filled((tokens, in_), **factory).requires_grad_()
        return (x, A, B, values, pointers, columns, rank**-0.5, bias), _filled((tokens, rows), **factory)


def _pass(copies, name, rows, tokens, forwards):
    """Function that does forward and backward of the first `rows` rows of the layer's W on `tokens` tokens."""
    turns = itertools.cycle([_one_pass(*one, name, forwards) for one in copies.of(rows, tokens)])
    return lambda: next(turns)()


def _one_pass(arguments, dy, name, forwards):
    x, A, B, values, *_, bias = arguments
    wanted = [x, A, B, values, *([] if bias is None else [bias])]

    def forward():
        return sltrain_linear.linear(*arguments, name)

    if name == "held":
        held = keep_step.Held()
        held.begin(first=True, last=False)
        wanted = [x, *wanted[4:]]

        def forward():
            return keep_step.linear(held, *arguments)

    def run():
        for _ in range(forwards - 1):
            with torch.no_grad():
                forward()
        torch.autograd.grad(forward(), wanted, dy)

    return run


def _filled(shape, dtype, device) -> torch.Tensor:
    """Normal numbers, repeating after a few thousand: drawing all of them would take longer than the measurement."""
    numel = math.prod(shape)
    some = torch.randn(min(numel, 4099) or 1, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return some.repeat(-(-numel // some.numel()))[:numel].view(shape)
