"""Choice among the modes of ``sltrain_linear`` for an SLTrain layer, and the modes of a model.

``plan`` chooses from measured times (``measure_modes``). ``rule`` chooses without measuring: for a layer outside a run,
and with `sltrain.deterministic`, under which two fresh runs must be bit-identical. In a run rank 0 chooses for all
ranks (zero/agree_on_modes.py).
"""

from collections.abc import Callable

import torch

from sltrain_ds.errors import UserError
from sltrain_ds.ops import spmm
from sltrain_ds.ops.sltrain_linear import MODES

CHOICES = ("auto", *MODES, "keep_step")
HOLDING = ("keep", "keep_step")  # modes that hold weights
ORDER = ("factored", "compose", "factored_dense", *HOLDING)  # preference among equally fast modes
NOISE = 0.03  # relative difference below which times count as equal


def rule(out: int, in_: int, tokens: int, device: str | torch.device) -> str:
    """Mode for a layer of these sizes by operation count alone; never one that holds weights.

    "factored" if sparse products are available. Otherwise S must be made dense: "factored_dense" takes
    6 T out in + 6 T r (out + in) operations and "compose" 6 T out in + 8 r out in, so the first is chosen up to
    T = 4/3 out in / (out + in), the second above.
    """
    if spmm.available(torch.device(device)):
        return "factored"
    return "factored_dense" if 3 * tokens * (out + in_) <= 4 * out * in_ else "compose"


def fastest(times: dict[str, float]) -> str:
    """The fastest mode; among those within NOISE of it the first in ORDER, to reduce the effect of noise."""
    least = min(times.values())
    return next(mode for mode in ORDER if mode in times and times[mode] <= least * (1 + NOISE))


def plan(
    times: dict[str, dict[str, float]],
    layers: dict[str, int],
    held: Callable[[str, str], int],
    fits: Callable[[dict[str, str]], bool],
) -> dict[str, str]:
    """Choose {shape: mode} from times, {shape: {mode: seconds per layer}}.

    layers: {shape: number of layers}; held(shape, mode): bytes that all of them hold in a mode of HOLDING;
    fits({shape: mode}): whether memory suffices for it. If memory does not suffice for the fastest modes everywhere, it
    goes to the shapes that save the most time per byte.
    """
    chosen = {
        shape: fastest({mode: seconds for mode, seconds in found.items() if mode not in HOLDING})
        for shape, found in times.items()
    }
    wishes = []
    for shape, found in times.items():
        for mode in HOLDING:
            saved = found[chosen[shape]] - found[mode] if mode in found else 0.0
            if saved > 0:
                wishes.append((saved * layers[shape] / held(shape, mode), shape, mode))
    for _, shape, mode in sorted(wishes, reverse=True):
        found = times[shape]
        if found[mode] * (1 + NOISE) < found[chosen[shape]] and fits(chosen | {shape: mode}):
            chosen[shape] = mode
    return chosen


def set_op_mode(model: torch.nn.Module, mode: str | dict[str, str]) -> None:
    """Set the mode of every SLTrain layer of the model: "auto", one of MODES, or {"OUTxIN": mode}."""
    for layer in layers(model):
        layer.op_mode = mode if isinstance(mode, str) else mode.get(shape_of(layer), "auto")


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that have modes."""
    return [module for module in model.modules() if hasattr(type(module), "op_mode")]


def shape_of(layer) -> str:
    """ "OUTxIN", as in a config's op_mode."""
    return f"{layer.out_features}x{layer.in_features}"


def chosen(model: torch.nn.Module) -> dict[str, str]:
    """{layer name: mode} of the layers whose mode is set or was chosen at their first forward."""
    return {layer.layer_name: layer.current_mode for layer in layers(model) if layer.current_mode}


def check(mode: str) -> str:
    if mode not in CHOICES:
        raise UserError(f'op_mode "{mode}" is not known; set one of {", ".join(CHOICES)}')
    return mode
