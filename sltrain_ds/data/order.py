"""Order of training samples as a pure function of (seed, sample number): no state, no stored permutation.

`assign` maps sample k of a run to a source, by weight, and to its number m among that source's samples. That is
position m % n of the source's epoch m // n. An epoch's order is a keyed bijection of [0, n), computed elementwise.
"""

import hashlib
from functools import lru_cache

import numpy as np

ROUNDS = 8
BLOCK = 1 << 16  # samples over which each source gets exactly its share


def key(*parts) -> int:
    """64-bit hash of the parts' repr."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): uint64 to uint64, wrapping."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(places: np.ndarray, n: int, key: int) -> np.ndarray:
    """Image of `places` (integers in [0, n)) under the bijection of [0, n) that `key` selects; int64, same shape.

    A Feistel network over the smallest power of four >= n; values outside [0, n) are permuted again until they fall
    inside (cycle walking, Black and Rogaway 2002), fewer than four passes on average.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    with np.errstate(over="ignore"):
        round_keys = _mix(np.uint64(key) + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        out = np.asarray(places).astype(np.uint64)
        walking = np.ones(out.shape, bool)
        while walking.any():
            x = out[walking]
            left, right = x >> half, x & low
            for round_key in round_keys:
                left, right = right, left ^ (_mix(right + round_key) & low)
            out[walking] = left << half | right
            walking = out >= np.uint64(n)
    return out.astype(np.int64)


def epoch_order(samples: np.ndarray, n: int, seed: int, source: int = 0) -> np.ndarray:
    """Sequence numbers in [0, n) of a source's samples m >= 0: each exactly once per epoch of n samples."""
    samples = np.asarray(samples, np.int64)
    out = np.empty_like(samples)
    for epoch in np.unique(samples // n):
        here = samples // n == epoch
        out[here] = permute(samples[here] % n, n, key("epoch", seed, source, int(epoch)))
    return out


def shares(weights: tuple[float, ...]) -> np.ndarray:
    """Samples per source in a block of `BLOCK`: proportional to weight, rounded by largest remainder."""
    exact = np.asarray(weights, float) / sum(weights) * BLOCK
    out = np.floor(exact).astype(np.int64)
    out[np.argsort(out - exact, kind="stable")[: BLOCK - out.sum()]] += 1
    return out


@lru_cache(4)
def _block(block: int, seed: int, weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Source of every sample of a block, and its number among that source's samples since the run's start."""
    counts = shares(weights)
    places = permute(np.arange(BLOCK), BLOCK, key("mixture", seed, block))
    source = np.searchsorted(np.cumsum(counts), places, side="right")
    number = np.empty(BLOCK, np.int64)
    for s, count in enumerate(counts):
        number[source == s] = block * count + np.arange(count)
    return source, number


def assign(samples: np.ndarray, seed: int, weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(source, that source's own sample number) of samples k >= 0, each int64 of the same shape."""
    samples = np.asarray(samples, np.int64)
    if len(weights) == 1:
        return np.zeros_like(samples), samples
    source, number = np.empty_like(samples), np.empty_like(samples)
    for block in np.unique(samples // BLOCK):
        here = samples // BLOCK == block
        sources, numbers = _block(int(block), seed, weights)
        source[here], number[here] = sources[samples[here] % BLOCK], numbers[samples[here] % BLOCK]
    return source, number
