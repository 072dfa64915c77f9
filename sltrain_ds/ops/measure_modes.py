"""What each mode takes on this machine: one layer, forward and backward, the modes in turn, round by round.

Where whole passes would take too long, slices of the layer are timed and scaled up by what is exactly linear:

    compose, keep               a slice of W's rows at `few` tokens, nearly all of it W's own cost, times out / rows;
                                and the three products with W ("held", below) at `many` tokens, times out / rows and
                                tokens / many
    factored, factored_dense    whole layers at `few` and at `many` tokens, a straight line through both

"held" is a micro-batch in the midst of a step in mode "keep_step": W is there already, and dW is added to. So a
micro-batch of "keep_step" takes, on average over n of them, what "held" takes and an n-th of what "keep" takes more.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sltrain_ds.ops import keep_step, sltrain_linear, spmm, support, timing, workspace

SECONDS = 0.8  # that a layer may take to measure, about
ROUNDS = 50  # at most, after one to warm up
BURST = 0.002  # seconds that a measurement takes at least
CACHE, COPIES = 16 << 20, 8  # bytes of the copies of a layer that take turns; how many at most
CLEARLY = (3.0, 1.5)  # times the best after the warm-up, and after any later round: clearly slower
SHORT = 0.05  # of the seconds: a warm-up's time up to which it tells nothing, since first calls allocate
_SPARSE = 8  # times a dense one: an operation of the sparse products, roughly; decides about slices alone


@dataclass(frozen=True)
class Layer:
    """A layer at work. `recomputed`: under activation checkpointing, so that its forward runs twice."""

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
    """What there is to be measured on the device, with what holds weights as far as that is asked for."""
    sparse = ["factored"] if spmm.available(torch.device(device)) else []  # else it is factored_dense by another name
    return [*sparse, "compose", "factored_dense", *["keep"] * (keep or held), *["held"] * held]


def measure(layer: Layer, names: list[str], seconds: float = SECONDS, timer=timing.seconds) -> dict[str, float]:
    """Seconds of a forward and backward, by name; `names` as `candidates` gives them.

    What is clearly slower than the best is not measured to the end: its time is a rough one. Leaves no memory behind,
    and torch's random numbers as they were.
    """
    try:
        with torch.enable_grad():
            tiny = replace(layer, out_features=8, in_features=8, rank=1, nnz=8, tokens=8)
            for name in names:  # what a process does once, such as to load libraries, is no layer's cost
                _pass(_Copies(tiny), name, 8, 8, 1)()
            return race(*_parts(layer, names, _rate(layer, timer), seconds), seconds, layer.device, timer)
    finally:
        workspace.release()
        if torch.device(layer.device).type == "cuda":
            torch.cuda.empty_cache()


def of_a_step(times: dict[str, float], micro_batches: int) -> dict[str, float]:
    """Mode -> seconds of a micro-batch, from what `measure` found: "held" becomes "keep_step"."""
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
    """Name -> seconds, the sum of its parts' fewest ones: `sums`, name -> {part of `runs`: how often it counts}.

    Rounds time every part once, the order turning by one place; they end with `seconds`, after the first at least, or
    when one mode is left. Who is clearly slower than the best drops out, and so do parts that nobody needs any more.
    `timer(run, calls, device)` gives the seconds of one call.
    """
    fewest, calls, spent, left = {}, dict.fromkeys(runs, 1), 0.0, list(sums)

    def total(name):  # a straight line through noise may fall, but no mode takes less than a part of it
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
    """(part -> call, name -> {part: how often it counts}), for passes that together take some `seconds` at most."""
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
    """Of `most`, its half, and so on down to 2, the first that fits; not more than there are."""
    while most > 2 and not fits(min(most, there)):
        most //= 2
    return min(most, there)


def _operations(layer, name, rows=None, tokens=None) -> float:
    """Of a forward and backward, those of sparse products weighted by what they cost more."""
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
    """Operations a second of a dense product, as large as it must be to take 5 ms."""
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
    """The tensors of a layer's passes, which all modes share.

    As in a model, a call finds other ones than the call before: several copies take turns, so many that the caches do
    not hold them all.
    """

    def __init__(self, layer: Layer):
        self.layer, self._drawn = layer, {}

    def of(self, rows: int, tokens: int) -> list[tuple]:
        """(linear's arguments up to the bias, dy) of the first `rows` rows of W, on so many tokens."""
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
    """A call that does forward and backward of the first `rows` rows of the layer's W, on so many tokens."""
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
    """Normal numbers, the same some thousand over and over: drawing them all takes longer than to compute with them."""
    numel = math.prod(shape)
    some = torch.randn(min(numel, 4099) or 1, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return some.repeat(-(-numel // some.numel()))[:numel].view(shape)
