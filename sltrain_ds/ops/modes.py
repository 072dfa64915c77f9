"""Which way an SLTrain layer computes: the choice among the modes of ``sltrain_linear``, and a model's modes.

``plan`` chooses from measured times (``measure_modes``). Where nothing may be measured, ``rule`` does: in a layer
outside a run, and with `sltrain.deterministic`, where two fresh runs must give the same bits. In a run rank 0 chooses
for all (zero/agree_on_modes.py).
"""

from collections.abc import Callable

import torch

from sltrain_ds.errors import UserError
from sltrain_ds.ops import spmm
from sltrain_ds.ops.sltrain_linear import MODES

CHOICES = ("auto", *MODES, "keep_step")
HOLDING = ("keep", "keep_step")  # they hold weights
ORDER = ("factored", "compose", "factored_dense", *HOLDING)  # of those that are equally fast, the first
NOISE = 0.03  # of a time: what differs by less is equally fast


def rule(out: int, in_: int, tokens: int, device: str | torch.device) -> str:
    """The mode for a layer of these sizes, from their arithmetic alone; never one that holds weights.

    "factored" where there are sparse products. Where S has to be made dense for it, "factored_dense" takes
    6 T out in + 6 T r (out + in) operations and "compose" 6 T out in + 8 r out in: so up to
    T = 4/3 out in / (out + in) the first, else the second.
    """
    if spmm.available(torch.device(device)):
        return "factored"
    return "factored_dense" if 3 * tokens * (out + in_) <= 4 * out * in_ else "compose"


def fastest(times: dict[str, float]) -> str:
    """The mode of the least time; of those within NOISE of it the first in ORDER, so that chance decides less."""
    least = min(times.values())
    return next(mode for mode in ORDER if mode in times and times[mode] <= least * (1 + NOISE))


def plan(
    times: dict[str, dict[str, float]],
    layers: dict[str, int],
    held: Callable[[str, str], int],
    fits: Callable[[dict[str, str]], bool],
) -> dict[str, str]:
    """Shape -> mode, from times: shape -> {mode: seconds of a layer}.

    layers: shape -> how many there are; held(shape, mode): bytes that they all hold in a mode of HOLDING;
    fits(shape -> mode): whether there is memory for it. Where not all can have what is fastest, memory goes to the
    shapes where a byte saves the most time.
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
