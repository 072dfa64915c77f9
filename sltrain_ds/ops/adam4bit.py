"""Blockwise 4-bit Adam and AdamW: the step of adam8bit.py with half the state bytes.

A byte holds two codes, element 2i in the low half; blocks of 128 values share an fp32 absmax. Codes of the first moment
index a signed dynamic map of three decades, codes of the second the linear map 1/16, 2/16 ... 1 without zero: a small
second moment rounded to 0 would cause a huge step (Li, Chen, Zhu, "Memory efficient optimizers with 4-bit states",
NeurIPS 2023, arXiv 2309.01507).

The C++ (csrc/adam4bit.cpp), the CUDA kernel (csrc/cuda/adam4bit.cu) and ``adam4bit_reference`` agree bit for bit,
except for the codes of a block whose absmax is not finite.
"""

import functools

import numpy as np
import torch
from torch.nn.functional import pad

from sltrain_ds.formats import STATES
from sltrain_ds.ops import builder, cuda, cuda_checks
from sltrain_ds.ops.adam8bit import as_int64, dynamic_map, stepped, store

BLOCK, PER_BYTE = STATES["4bit"]
PIECE = 1 << 22  # values that the reference processes at a time; its temporaries take about 100 MB


def new_states(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(m4, v4, absmax_m, absmax_v) before p's first step: uint8 (ceil(n / 2),) and float32 (ceil(n / 128),)."""
    n = p.numel()
    zeros = functools.partial(torch.zeros, device=p.device)
    blocks, codes = -(-n // BLOCK), -(-n // 2)
    return zeros(codes, dtype=torch.uint8), zeros(codes, dtype=torch.uint8), zeros(blocks), zeros(blocks)


@torch.no_grad()
def adam4bit_step_(
    p: torch.Tensor,
    g: torch.Tensor,
    m4: torch.Tensor,
    v4: torch.Tensor,
    absmax_m: torch.Tensor,
    absmax_v: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    stochastic: bool = False,
    seed: int = 0,
    key: int = 0,
    offset: int = 0,
    grad_scale: float = 1.0,
) -> None:
    """Step ``p`` (numel n) and its states in place; arguments as in ``adam8bit.adam8bit_step_``, except the states:

    m4, v4: uint8 (ceil(n / 2),); absmax_m, absmax_v: float32 (ceil(n / 128),). ``offset`` is a multiple of 256.
    Raises RuntimeError for other dtypes, sizes or layouts.
    """
    arguments = (p, g, m4, v4, absmax_m, absmax_v, tables(p.device), float(lr), betas[0], betas[1], eps, weight_decay)
    arguments += (decoupled, step, stochastic, as_int64(seed), as_int64(key), offset, float(grad_scale))
    if p.device.type == "cpu" and builder.load():
        torch.ops.sltrain.adam4bit_step_(*arguments)
    elif p.device.type == "cuda" and cuda.load():
        cuda.adam4bit_step_(*arguments)
    else:
        adam4bit_reference(*arguments)


step_ = adam4bit_step_  # the name optim/blockwise_adam.py uses for every format


def adam4bit_reference(
    p, g, m4, v4, absmax_m, absmax_v, tables, lr, beta1, beta2, eps, weight_decay, decoupled, step, stochastic,
    seed, key, offset, grad_scale,
):  # fmt: skip
    """The same step in PyTorch: the reference for the kernels' tests, and the fallback without kernels."""
    cuda_checks.check_adam4bit(p, g, m4, v4, absmax_m, absmax_v, tables, step, offset)
    signed, signed_bounds, unsigned, unsigned_bounds = tables.split((16, 15, 16, 15))
    whole, gradient = p.view(-1), g.view(-1)
    for first in range(0, p.numel(), PIECE):
        p, g = whole[first : first + PIECE], gradient[first : first + PIECE]
        codes, blocks = (slice(first // k, (first + PIECE) // k) for k in (2, BLOCK))
        m = _dequantize(m4[codes], absmax_m[blocks], signed, p.numel())
        v = _dequantize(v4[codes], absmax_v[blocks], unsigned, p.numel())
        wide, m, v = stepped(p, g, m, v, lr, beta1, beta2, eps, weight_decay, decoupled, step, grad_scale)
        store(p, wide, stochastic, seed, step, key, offset + first)
        _quantize_(m4[codes], absmax_m[blocks], m, signed_bounds)
        _quantize_(v4[codes], absmax_v[blocks], v, unsigned_bounds)


@functools.cache
def tables(device: torch.device) -> torch.Tensor:
    """float32 (62,): the first moment's 16 values and the 15 bounds between them, then the second moment's."""
    maps = [dynamic_map(signed=True, decades=3), np.arange(1, 17, dtype=np.float32) / np.float32(16)]
    parts = [part for values in maps for part in (values, (values[:-1] + values[1:]) / np.float32(2))]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def _dequantize(codes, absmax, values, n):
    whole = torch.stack((codes & 15, codes >> 4), 1).view(-1)[:n]
    return values[whole.long()] * absmax.repeat_interleave(BLOCK)[:n]


def _quantize_(codes, absmax, x, bounds):
    """Write the nearest code of each value in units of its block's absmax; ties go to the lower code."""
    blocks = pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax.copy_(blocks.abs().amax(1))
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)
    found = torch.bucketize(scaled, bounds).view(-1)[: x.numel()].to(torch.uint8)
    low, high = pad(found, (0, x.numel() % 2)).view(-1, 2).unbind(1)
    codes.copy_(low | high << 4)
