"""Blockwise 8-bit Adam and AdamW: one step of a flat parameter or of any slice of one.

The moments are stored as bytes: blocks of 256 values share an fp32 absmax, and a byte indexes the dynamic map, signed
for the first moment, unsigned for the second (Dettmers, "8-bit approximations for parallelism in deep learning",
arXiv 1511.04561; Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861). States, formula
and rounding are those of bitsandbytes (0.50), so its checkpoints and ours are byte-identical.

bfloat16 parameters are rounded to nearest, or stochastically by adding 16 bits of noise below the kept bits. The noise
is an integer function of (seed, step, key, element index), so it does not depend on world size, sharding, threads or
device. The C++ (csrc/adam8bit.cpp), the CUDA kernel (csrc/cuda/adam8bit.cu) and ``adam8bit_reference`` do the same
operations in the same order, each rounded separately. They agree bit for bit, except for the codes of a block whose
absmax is not finite, which have no meaning.
"""

import functools
import hashlib
import math

import numpy as np
import torch

from sltrain_ds.formats import STATES
from sltrain_ds.ops import builder, cuda, cuda_checks

BLOCK, PER_BYTE = STATES["8bit"]
_FIRST_BUCKET, _BUCKETS, _CARRY_BITS = 104 << 7, 23 * 128 + 1, 17  # as in csrc/cuda/adam8bit.h
_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1


def new_states(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(m8, v8, absmax_m, absmax_v) before p's first step: zeros, uint8 (n,) and float32 (ceil(n / 256),), n = numel."""
    n = p.numel()
    zeros = functools.partial(torch.zeros, device=p.device)
    blocks = -(-n // BLOCK)
    return zeros(n, dtype=torch.uint8), zeros(n, dtype=torch.uint8), zeros(blocks), zeros(blocks)


def parameter_key(name: str) -> int:
    """Noise key of a parameter: 63 bits of the SHA-256 of its canonical dotted name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def adam8bit_step_(
    p: torch.Tensor,
    g: torch.Tensor,
    m8: torch.Tensor,
    v8: torch.Tensor,
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
    """Step ``p`` and its states in place; ``step`` counts from 1.

    p, g: float32 or bfloat16, contiguous, any shape, numel n; m8, v8: uint8 (n,); absmax_m, absmax_v: float32
    (ceil(n / 256),). ``decoupled`` selects AdamW's weight decay; otherwise it is added to the gradient. ``grad_scale``
    multiplies the gradient first. ``stochastic`` rounds a bfloat16 p with noise keyed by (seed, step, key, element); it
    has no effect on a float32 p. ``offset``, a multiple of 256, is the index of p's first element within its parameter:
    a shard's result equals the same slice of the whole parameter's.
    Raises RuntimeError for other dtypes, sizes or layouts.
    """
    arguments = (p, g, m8, v8, absmax_m, absmax_v, tables(p.device), float(lr), betas[0], betas[1], eps, weight_decay)
    arguments += (decoupled, step, stochastic, as_int64(seed), as_int64(key), offset, float(grad_scale))
    if p.device.type == "cpu" and builder.load():
        torch.ops.sltrain.adam8bit_step_(*arguments)
    elif p.device.type == "cuda" and cuda.load():
        cuda.adam8bit_step_(*arguments)
    else:
        adam8bit_reference(*arguments)


step_ = adam8bit_step_  # the name optim/blockwise_adam.py uses for every format


def adam8bit_reference(
    p, g, m8, v8, absmax_m, absmax_v, tables, lr, beta1, beta2, eps, weight_decay, decoupled, step, stochastic,
    seed, key, offset, grad_scale,
):  # fmt: skip
    """The same step in PyTorch: the reference for the kernels' tests, and the fallback without kernels.

    Takes the operator's arguments; it uses only the maps in ``tables`` and searches them by bisection.
    """
    cuda_checks.check_adam(p, g, m8, v8, absmax_m, absmax_v, tables, step, offset)
    signed, unsigned = tables[:512].view(torch.float32).split(256)
    m, v = _dequantize(m8, absmax_m, signed), _dequantize(v8, absmax_v, unsigned)
    wide, m, v = stepped(p, g, m, v, lr, beta1, beta2, eps, weight_decay, decoupled, step, grad_scale)
    store(p, wide, stochastic, seed, step, key, offset)
    _quantize_(m8, absmax_m, m, signed)
    _quantize_(v8, absmax_v, v, unsigned)


def stepped(p, g, m, v, lr, beta1, beta2, eps, weight_decay, decoupled, step, grad_scale):
    """Parameter, first and second moment after a step, float32 (n,) each, by `adam_update` of csrc/cuda/adam8bit.h."""
    wide = p.reshape(-1).float()
    grad = g.reshape(-1).float() * grad_scale + wide * (0.0 if decoupled else weight_decay)
    m = m * beta1 + grad * (1.0 - beta1)
    v = v * beta2 + (grad * grad) * (1.0 - beta2)
    root = v.double().sqrt().float()  # torch's fp32 sqrt is not always correctly rounded
    denominator = root * (1.0 / math.sqrt(1.0 - beta2**step)) + eps
    decay = 1.0 - lr * weight_decay if decoupled else 1.0
    return wide * decay - (m / denominator) * (lr / (1.0 - beta1**step)), m, v


def store(p, wide, stochastic, seed, step, key, offset) -> None:
    """Write float32 (n,) into p in p's dtype, with stochastic rounding if requested."""
    if p.dtype == torch.bfloat16 and stochastic:
        wide = round_stochastically(wide, seed, step, key, offset)
    p.view(-1).copy_(wide)


def dynamic_map(signed: bool, decades: int = 7) -> np.ndarray:
    """Float32 values of all codes, 256 for seven decades, 16 for three; ascending, in [-1, 1] or [0, 1].

    Lower decades have more leading zero bits and fewer fraction bits: decade i of d contains the centres of 2^i
    (signed) or 2^(i+1) (unsigned) equal parts of [0.1, 1], scaled by 10^(i-d+1); 0 and 1 are added.
    """
    values = [np.float32(0), np.float32(1)]
    for i in range(decades):
        parts = 2 ** (i if signed else i + 1)
        width = float((np.float32(1) - np.float32(0.1)) / np.float32(parts))
        k = np.arange(parts + 1)
        # computed from both ends and rounded once, like torch.linspace
        edges = np.where(k < (parts + 1) // 2, float(np.float32(0.1)) + width * k, 1.0 - width * (parts - k))
        edges = edges.astype(np.float32)
        centres = np.float32(10.0 ** (i - decades + 1)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*centres, *(-centres if signed else [])]
    return np.sort(np.array(values, dtype=np.float32))


@functools.cache
def tables(device: torch.device) -> torch.Tensor:
    """int32 (6402,): the bits of both maps, then each map's bucket table, for finding a float's code in one look-up.

    A bucket is the set of floats with the same exponent and first 7 mantissa bits; it contains at most one bound
    between neighbouring codes. Its entry is the number of bounds below the bucket times 2^17, plus an addend for a
    float's low mantissa bits such that the sum carries if they exceed those of the bound inside.
    """
    maps = [dynamic_map(signed=True), dynamic_map(signed=False)]
    return torch.from_numpy(np.concatenate([*(m.view(np.int32) for m in maps), *map(_buckets, maps)])).to(device)


def _buckets(values: np.ndarray) -> np.ndarray:
    bounds = _bounds(values)
    bits = bounds[bounds > 0].view(np.uint32)  # same order as the floats
    bucket = (bits >> 16).astype(np.int64) - _FIRST_BUCKET
    assert bucket[0] > 0 and (np.diff(bucket) > 0).all(), "a bucket holds at most one bound, the first holds none"
    below = np.searchsorted(bucket, np.arange(_BUCKETS))
    carry = np.zeros(_BUCKETS, dtype=np.int64)
    carry[bucket] = (1 << _CARRY_BITS) - 1 - (bits & 0xFFFF)
    return (below << _CARRY_BITS | carry).astype(np.int32)


def _bounds(values):
    return (values[:-1] + values[1:]) / np.float32(2)


def dequantize(codes, absmax, signed: bool):
    """float32 (n,) from uint8 (n,) codes of a first (``signed``) or second moment and absmax (ceil(n / 256),)."""
    return _dequantize(codes, absmax, _map(signed, codes.device))


def quantize(x, signed: bool, absmax):
    """uint8 (n,) codes of float32 (n,); writes the blocks' absmax to ``absmax``."""
    codes = torch.empty_like(x, dtype=torch.uint8)
    _quantize_(codes, absmax, x, _map(signed, x.device))
    return codes


def _map(signed, device):
    return tables(device)[:512].view(torch.float32).split(256)[0 if signed else 1]


def _dequantize(codes, absmax, values):
    return values[codes.reshape(-1).long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]


def _quantize_(codes, absmax, x, values):
    """Write the nearest code of each value in units of its block's absmax; ties go to the lower code."""
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax.copy_(blocks.abs().amax(1))
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp(-1.0, 1.0)
    bounds = (values[:-1] + values[1:]) / 2
    codes.view(-1).copy_(torch.bucketize(scaled, bounds).view(-1)[: codes.numel()])


def round_stochastically(x, seed, step, key, offset):
    """Round float32 (n,) to bfloat16 (n,), up with probability equal to the distance from the value below."""
    bits = (x.view(torch.int32).long() & _MASK32) + rounding_noise(x.numel(), seed, step, key, offset, x.device)
    kept = bits >> 16 << 16 & _MASK32
    rounded = torch.where(kept > 0x7FFFFFFF, kept - (1 << 32), kept).to(torch.int32).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).bfloat16()


def rounding_noise(n, seed, step, key, offset=0, device="cpu"):
    """int64 (n,): 16 random bits per element of a parameter, starting at ``offset``, a multiple of 256.

    splitmix64 over (seed, step, key) gives two words; murmur3's finaliser of the block index with them gives two words
    per block. Each pair of neighbours in a block uses one step of a Weyl sequence from there, mixed again; each element
    takes half of the word.
    """
    state = 0
    for word in (seed, step, key):
        state = _mix64(state ^ (word & _MASK64))
    block = torch.arange(offset // BLOCK, offset // BLOCK + -(-n // BLOCK), device=device).unsqueeze(1)
    start = _mix32(block & _MASK32 ^ (state & _MASK32))
    flip = _mix32((start + (state >> 32 ^ block >> 32)) & _MASK32)
    i = torch.arange(BLOCK, device=device)
    pair = _mix32((start + (i >> 1) * 0x9E3779B9) & _MASK32) ^ flip
    return (pair >> 16 * (i & 1) & 0xFFFF).view(-1)[:n]


def _mix32(h):
    """murmur3's finaliser on 32-bit values in int64 tensors."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK32
    return h ^ (h >> 16)


def _mix64(z):
    """splitmix64's finaliser after one step of its counter."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def as_int64(word):
    word &= _MASK64
    return word - (1 << 64) if word >> 63 else word
