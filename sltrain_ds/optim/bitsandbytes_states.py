"""Optimizer states to and from bitsandbytes' 8-bit Adam (0.50): a run may go on with the other implementation.

Of a whole parameter the bytes are the same, under other names. Where bitsandbytes keeps 32-bit states (tensors under
4,096 values) and `BlockwiseAdam` 8-bit ones, they are widened one way, exactly, and quantised the other way.
"""

import torch

from sltrain_ds.errors import UserError
from sltrain_ds.ops import adam8bit
from sltrain_ds.optim.blockwise_adam import ABSMAX, MOMENTS, BlockwiseAdam

_STATE, _ABSMAX = ("state1", "state2"), ("absmax1", "absmax2")
_SIGNED = (True, False)


def to_bitsandbytes(ours: BlockwiseAdam, theirs) -> None:
    """Copy the states of `ours` into `theirs`, a `bitsandbytes.optim.Adam(W)8bit` over the same parameters.

    Each gets the format that bitsandbytes would give it itself. Raises `UserError` for 4-bit states and for flat
    partitions, where bitsandbytes places its blocks differently.
    """
    theirs.check_overrides()
    for i, group in enumerate(theirs.param_groups):
        for j, p in enumerate(group["params"]):
            state = ours.state.get(p)
            if not state:
                continue
            _check_whole(ours, p, state)
            theirs.init_state(group, p, i, j)
            into, n = theirs.state[p], p.numel()
            into["step"] = state["step"]
            for moment, absmax, name, scale, signed in zip(MOMENTS, ABSMAX, _STATE, _ABSMAX, _SIGNED, strict=True):
                codes = state[moment].view(-1)[:n]
                if into[name].dtype == torch.uint8 and absmax in state:
                    into[name].view(-1).copy_(codes)
                    into[scale].copy_(state[absmax])
                elif into[name].dtype == torch.uint8:
                    into[name].view(-1).copy_(adam8bit.quantize(codes, signed, into[scale]))
                else:
                    wide = adam8bit.dequantize(codes, state[absmax], signed) if absmax in state else codes
                    into[name].view(-1).copy_(wide)


def from_bitsandbytes(theirs, ours: BlockwiseAdam) -> None:
    """Copy the states of `theirs` into `ours`, over the same parameters; the inverse of `to_bitsandbytes`."""
    for group in ours.param_groups:
        for p in group["params"]:
            state = theirs.state.get(p)
            if not state:
                continue
            into = ours.new_state(p, group)
            _check_whole(ours, p, into)
            into["step"], n = int(state["step"]), p.numel()
            for moment, absmax, name, scale, signed in zip(MOMENTS, ABSMAX, _STATE, _ABSMAX, _SIGNED, strict=True):
                values = state[name].view(-1)
                if values.dtype == torch.uint8 and absmax in into:
                    into[moment][:n] = values
                    into[absmax].copy_(state[scale])
                elif absmax in into:
                    into[moment][:n] = adam8bit.quantize(values, signed, into[absmax])
                else:
                    wide = values if values.dtype != torch.uint8 else adam8bit.dequantize(values, state[scale], signed)
                    into[moment].view(-1).copy_(wide)
            ours.state[p] = into


def _check_whole(ours, p, state):
    segments = ours.segments_of(p)
    if len(segments) != 1 or (segments[0].start, segments[0].stop, segments[0].offset) != (0, p.numel(), 0):
        raise UserError(
            "states of a ZeRO partition do not convert to bitsandbytes', which places its blocks differently"
        )
    if ABSMAX[0] in state and ours.states != "8bit":
        raise UserError(f'states "{ours.states}" do not convert to bitsandbytes\'; only "8bit" ones do')
