"""Which way an SLTrain layer computes: a cost model of the four modes of ``sltrain_linear``.

The model is a pure function of the layer's shape, dtype, token count and a few measured constants, so every rank comes
to the same choice. For one forward and backward of T tokens through an (out, in) layer of rank r with n non-zeros:

    GEMM(m, n, k)   2 m n k / gemm
    compose         2 W + GEMMs y, dx, dW, dA, dB of full size        W: GEMM(out, in, r), n scattered
    keep            the same with one W less
    factored        6 GEMMs with r as one side, 3 sparse products of 2 T n / sparse, activations turned, S turned
    factored_dense  6 GEMMs with r as one side, S made dense twice, 3 GEMMs of full size

Constants are a flat dict of floats, keys "device.dtype.name":

    gemm      dense multiply-adds, flop/s                  sparse   flop/s of the blocked sparse products (0: none)
    element   seconds to turn or add an element of x, y    nonzero  seconds to move a non-zero (scatter, gather, turn)
    weight    seconds to write or read an element of W     call     seconds of fixed cost of one GEMM or kernel

The built-in ones were measured (see docs/benchmarks.md); ``calibrate`` measures them on this machine and ``load`` reads
what it wrote.
"""

import json
import math
from pathlib import Path

import torch

from sltrain_ds.errors import UserError
from sltrain_ds.ops.sltrain_linear import MODES

CHOICES = ("auto", *MODES)
NAMES = ("gemm", "sparse", "element", "nonzero", "weight", "call")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_CPU = {"element": 3e-10, "nonzero": 2.5e-9, "weight": 2e-10, "call": 1e-5}
_GPU = {"sparse": 0.0, "element": 2e-12, "nonzero": 2e-11, "weight": 2e-12, "call": 5e-6}
DEFAULTS = {
    f"{place}.{name}": value
    for place, values in {
        "cpu.float32": {"gemm": 3.6e11, "sparse": 1.2e11, **_CPU},
        "cpu.bfloat16": {"gemm": 2.2e12, "sparse": 1.2e11, **_CPU},
        "cuda.float32": {"gemm": 4e13, **_GPU},
        "cuda.bfloat16": {"gemm": 5e14, **_GPU},
    }.items()
    for name, value in values.items()
}


def choose(out, in_, rank, nnz, tokens, dtype=torch.float32, device="cpu", constants=None, keep_bytes=0) -> str:
    """The cheapest of "compose", "factored", "factored_dense" and "keep" for a layer of these sizes.

    dtype is the compute dtype, device a type ("cpu", "cuda"). "keep" is considered where W takes at most keep_bytes.
    """
    costs = estimate(out, in_, rank, nnz, tokens, dtype, device, constants)
    if out * in_ * dtype.itemsize > keep_bytes:
        del costs["keep"]
    return min(costs, key=costs.get)


def estimate(out, in_, rank, nnz, tokens, dtype=torch.float32, device="cpu", constants=None) -> dict[str, float]:
    """Mode -> seconds of a forward and backward. "factored" is left out where there is no sparse product."""
    gemm, sparse, element, nonzero, weight, call = _constants(dtype, device, constants)
    full = 2 * out * in_ * tokens / gemm + call
    product = 2 * out * in_ * rank / gemm + call + out * in_ * weight  # BA, or a gradient through it
    thin = 6 * tokens * rank * (out + in_) / gemm + 6 * call
    W = product + nnz * nonzero + call
    dense = out * in_ * weight + nnz * nonzero + 2 * call
    seconds = {
        "compose": 3 * full + 2 * W + 2 * product + nnz * nonzero,
        "keep": 3 * full + W + 2 * product + nnz * nonzero,
        "factored": math.inf,
        "factored_dense": thin + 3 * full + 2 * dense + nnz * nonzero,
    }
    if sparse:
        turned = tokens * (3 * in_ + 2 * out) * element  # x twice and dy turned, y and dx added to
        seconds["factored"] = thin + 6 * tokens * nnz / sparse + turned + 2 * nnz * nonzero + 6 * call
    else:
        del seconds["factored"]
    return seconds


def load(path: str | Path | None = None) -> dict[str, float]:
    """The built-in constants, with those of a JSON file written by ``calibrate``'s caller in their place."""
    if path is None:
        return dict(DEFAULTS)
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no constants could be read ({error}); write them with bench op --calibrate") from None
    if not isinstance(found, dict):
        raise UserError(f'{path}: must be an object like {{"cpu.float32.gemm": 3.6e11, ...}}')
    for key, value in found.items():
        if key.rsplit(".", 1)[-1] not in NAMES or isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path}: {key}: {value!r} is no constant; keys are device.dtype.name, name one of {NAMES}")
        if not (0 <= value < math.inf) or (value == 0 and key.endswith(".gemm")):
            raise UserError(f"{path}: {key} = {value} must be positive and finite")
    return {**DEFAULTS, **found}


def _constants(dtype, device, constants):
    constants = DEFAULTS if constants is None else constants
    place = f"{device}.{_DTYPES.get(dtype, 'float32' if dtype.itemsize > 2 else 'bfloat16')}"
    if f"{place}.gemm" not in constants:
        place = place.replace(device, "cuda", 1)  # another accelerator
    return [constants[f"{place}.{name}"] for name in NAMES]


def set_op_mode(model: torch.nn.Module, mode: str) -> None:
    """Make every SLTrain layer of the model compute in ``mode``: "auto" or one of MODES."""
    for module in model.modules():
        if hasattr(type(module), "op_mode"):
            module.op_mode = mode


def chosen(model: torch.nn.Module) -> dict[str, str]:
    """Layer name -> mode, of the layers that have one: set, or chosen at their first forward."""
    layers = [module for module in model.modules() if hasattr(type(module), "op_mode")]
    return {layer.layer_name: layer.current_mode for layer in layers if layer.current_mode}


def check(mode: str) -> str:
    if mode not in CHOICES:
        raise UserError(f'op_mode "{mode}" is not known; set one of {", ".join(CHOICES)}')
    return mode
