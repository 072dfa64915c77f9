"""Which way an SLTrain layer computes: a cost model of the modes of ``sltrain_linear``.

The model says how many seconds a forward and backward of T tokens take in each mode, for an (out, in) layer of rank r
with n non-zeros. A mode's time is a sum of terms, each a count times a measured constant:

    full        T * out * in         GEMMs with the whole weight: y, dx, dW, or the three of a dense S
    thin        T * r * (out + in)   GEMMs through the factors
    sparse      T * n                sparse products
    product     r * out * in         B A, and the gradients of both through dW
    weight      out * in             W written, read, added to
    factor      r * (out + in)       A and B read, their gradients written
    nonzero     n                    scatter, gather, turn
    activation  T * (out + in)       x, y and their gradients written, read, turned
    layer       1                    what a call costs at any size

Constants are seconds for one unit of a count, a flat dict with keys "device.dtype.mode.term" (modes as in TERMS; "keep"
serves "keep_step" too). ``fit`` finds them from measured times, `sltrain-ds bench op --calibrate` measures and writes
them, ``load`` reads them; the built-in ones lie in constants.json beside this file. The choice is a pure function of
these, but ranks may read different files: in a run rank 0 chooses for all (zero/agree_on_modes.py).
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from sltrain_ds.errors import UserError
from sltrain_ds.ops.sltrain_linear import MODES

CHOICES = ("auto", *MODES, "keep_step")
_OF_W = ("full", "product", "weight", "nonzero", "activation", "layer")
TERMS = {
    "compose": _OF_W,
    "keep": _OF_W,
    "factored": ("thin", "sparse", "factor", "nonzero", "activation", "layer"),
    "factored_dense": ("full", "thin", "weight", "nonzero", "activation", "layer"),
}
FILE = Path(__file__).with_name("constants.json")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def counts(out, in_, rank, nnz, tokens) -> dict[str, int]:
    """Term -> how often it occurs in a forward and backward."""
    return {
        "full": tokens * out * in_,
        "thin": tokens * rank * (out + in_),
        "sparse": tokens * nnz,
        "product": rank * out * in_,
        "weight": out * in_,
        "factor": rank * (out + in_),
        "nonzero": nnz,
        "activation": tokens * (out + in_),
        "layer": 1,
    }


def estimate(out, in_, rank, nnz, tokens, dtype=torch.float32, device="cpu", constants=None) -> dict[str, float]:
    """Mode -> seconds of a forward and backward; modes without constants for the device are left out."""
    constants, place = BUILT_IN if constants is None else constants, _place(dtype, device)
    count = counts(out, in_, rank, nnz, tokens)
    return {
        mode: sum(count[term] * constants[f"{place}.{mode}.{term}"] for term in terms)
        for mode, terms in TERMS.items()
        if f"{place}.{mode}.layer" in constants
    }


def choose(out, in_, rank, nnz, tokens, dtype=torch.float32, device="cpu", constants=None, keep_bytes=0) -> str:
    """The cheapest of "compose", "factored", "factored_dense" and "keep" for a layer of these sizes.

    dtype is the compute dtype, device a type ("cpu", "cuda"). "keep" is considered where W takes at most keep_bytes.
    """
    costs = estimate(out, in_, rank, nnz, tokens, dtype, device, constants)
    if out * in_ * dtype.itemsize > keep_bytes:
        costs.pop("keep", None)
    return min(costs, key=costs.get)


def plan(sizes: dict, alive: dict, layers: dict, tokens, dtype, device, micro_batches=1, constants=None, keep_bytes=0):
    """Shape -> mode for the layers of a model that share ``keep_bytes``.

    sizes: shape -> (out, in, rank, nnz); layers: shape -> how many there are; alive: shape -> how many of them hold
    their W at once in "keep". Over several micro-batches a step, "keep_step" is considered too: it holds W and dW of
    every layer. Where not all can have what is fastest, memory goes to the shapes where a byte saves the most time.
    """
    chosen, wishes = {}, []
    for shape, size in sizes.items():
        costs = estimate(*size, tokens, dtype, device, constants)
        mode = chosen[shape] = min((name for name in costs if name != "keep"), key=costs.get)
        weight = size[0] * size[1] * dtype.itemsize
        held = {"keep": (costs["keep"], alive[shape] * weight)}
        if micro_batches > 1:
            seconds = keep_step_seconds(*size, tokens, dtype, device, micro_batches, constants)
            held["keep_step"] = (seconds, 2 * layers[shape] * weight)
        gains = [((costs[mode] - s) * layers[shape] / nbytes, name, nbytes) for name, (s, nbytes) in held.items()]
        wishes += [(gain, shape, name, nbytes) for gain, name, nbytes in gains if gain > 0]
    taken = dict.fromkeys(sizes, 0)
    for _, shape, name, nbytes in sorted(wishes, reverse=True):
        more = nbytes - taken[shape]
        if 0 < more <= keep_bytes:
            chosen[shape], taken[shape] = name, nbytes
            keep_bytes -= more
    return chosen


def keep_step_seconds(out, in_, rank, nnz, tokens, dtype, device, micro_batches, constants=None) -> float:
    """Of a micro-batch in "keep_step": that of "keep", with W built and dW projected once for all of them."""
    constants, place = BUILT_IN if constants is None else constants, _place(dtype, device)
    count = counts(out, in_, rank, nnz, tokens)
    shared = {"product", "nonzero"}
    return sum(
        count[term] * constants[f"{place}.keep.{term}"] / (micro_batches if term in shared else 1)
        for term in TERMS["keep"]
    )


def fit(mode: str, sizes: list[tuple], seconds: list[float]) -> dict[str, float]:
    """Constants of a mode, term -> seconds, from measured (out, in, rank, nnz, tokens) and times.

    Non-negative least squares of the relative error, by coordinate descent: what matters is to be right by some
    percent at every size, not by some milliseconds at the largest.
    """
    terms = TERMS[mode]
    rows = np.array([[counts(*size)[term] for term in terms] for size in sizes], dtype=float)
    rows /= np.array(seconds)[:, None]
    scale = np.maximum(np.linalg.norm(rows, axis=0), 1e-300)
    rows /= scale
    gram, target = rows.T @ rows, rows.sum(0)
    found = np.zeros(len(terms))
    for _ in range(100_000):
        before = found.copy()
        for i in range(len(terms)):
            found[i] = max(0.0, found[i] + target[i] - gram[i] @ found)  # the diagonal is 1
        if np.abs(found - before).max() <= 1e-10 * found.max():
            break
    return dict(zip(terms, (found / scale).tolist(), strict=True))


def load(path: str | Path | None = None) -> dict[str, float]:
    """The built-in constants, with those of a JSON file written by ``bench op --calibrate`` in their place.

    Raises UserError for a file that cannot be used.
    """
    return BUILT_IN if path is None else {**BUILT_IN, **_read(Path(path))}


def _read(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no constants could be read ({error}); write them with bench op --calibrate") from None
    return _checked(found, path)


def _checked(found, path):
    table = found.get("constants") if isinstance(found, dict) else None
    if not isinstance(table, dict):
        raise UserError(f'{path}: must be an object {{"constants": {{...}}}}; write it with bench op --calibrate')
    for key, value in table.items():
        place, _, term = key.rpartition(".")
        if term not in TERMS.get(place.rpartition(".")[2], ()) or key.count(".") != 3:
            raise UserError(
                f'{path}: "{key}" is no constant; keys are device.dtype.mode.term, like cpu.float32.keep.full'
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"{path}: {key} = {value!r} must be a number of seconds, not negative")
    for place in {key.rsplit(".", 1)[0] for key in table}:
        missing = [term for term in TERMS[place.rpartition(".")[2]] if f"{place}.{term}" not in table]
        if missing:
            raise UserError(f"{path}: {place}.{missing[0]} is missing; write the file with bench op --calibrate")
    return table


BUILT_IN = _read(FILE)


def _place(dtype, device):
    kind = _DTYPES.get(dtype, "float32" if dtype.itemsize > 2 else "bfloat16")
    return f"{'cpu' if device == 'cpu' else 'cuda'}.{kind}"


def set_op_mode(model: torch.nn.Module, mode: str | dict[str, str]) -> None:
    """Make every SLTrain layer of the model compute in ``mode``: "auto", one of MODES, or {"OUTxIN": mode}."""
    for layer in layers(model):
        layer.op_mode = mode if isinstance(mode, str) else mode.get(shape_of(layer), "auto")


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that have modes."""
    return [module for module in model.modules() if hasattr(type(module), "op_mode")]


def shape_of(layer) -> str:
    """ "OUTxIN", as in a config's op_mode."""
    return f"{layer.out_features}x{layer.in_features}"


def chosen(model: torch.nn.Module) -> dict[str, str]:
    """Layer name -> mode, of the layers that have one: set, or chosen at their first forward."""
    return {layer.layer_name: layer.current_mode for layer in layers(model) if layer.current_mode}


def check(mode: str) -> str:
    if mode not in CHOICES:
        raise UserError(f'op_mode "{mode}" is not known; set one of {", ".join(CHOICES)}')
    return mode
