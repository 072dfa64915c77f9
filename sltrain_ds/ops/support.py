"""Random support of S: the positions of the (out, in) matrix that may be non-zero.

It has exactly ``int(density * out * in)`` positions, uniform without replacement. It is a function of (support_seed,
layer name, out, in), computed by our own counter-based integer generator, so that every rank, device and library
version draws the same support.

Row counts are drawn first, then each row's columns, both with a keyed bijection (a Feistel network on the residues Z_a
x Z_b of Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002):

* row counts: the rows of the bijection's first nnz of out * in cells, counted; integers only, exactly hypergeometric;
* columns of a row: the first ``count`` values of a bijection of [0, in) keyed by the row, sorted.

A single row can therefore be drawn alone, given its count. The layout is row-wise: row pointers int32 (out + 1),
columns sorted within each row, uint16 (int32 if in > 65,536). This file is the numpy reference; csrc/support.cpp draws
the same bits in parallel.
"""

import zlib
from math import isqrt

import numpy as np
import torch

from sltrain_ds import formats
from sltrain_ds.errors import UserError

GENERATOR_VERSION = 1
ROUNDS = 8  # of the Feistel network, four per half; more than the statistical tests can detect
SMALLEST_SIDE = 4  # minimum size of Z_a and Z_b: on smaller domains, eight rounds are visibly non-uniform
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
nnz_of = formats.nonzeros
_CHUNK = 1 << 20  # positions drawn at a time, to bound the reference's temporaries


def column_dtype(in_features: int) -> torch.dtype:
    return torch.uint16 if formats.column_bytes(in_features) == 2 else torch.int32


def keys(support_seed: int, layer_name: str) -> tuple[int, int]:
    """64-bit keys (for row counts, for columns) from the generator version, the seed and the name's bytes."""
    state = _mix64(GENERATOR_VERSION)
    name = layer_name.encode("utf-8")
    words = [support_seed & _MASK64, len(name)]
    words += [int.from_bytes(name[i : i + 8], "little") for i in range(0, len(name), 8)]
    for word in words:
        state = _mix64((state ^ word) + _GOLDEN & _MASK64)
    return _mix64(state ^ 1), _mix64(state ^ 2)


def sample(out_features, in_features, nnz, support_seed, layer_name, native=True):
    """Draw a support.

    Returns (rows, columns) on the CPU: int32 (out + 1) row pointers and (nnz,) sorted columns of ``column_dtype(in)``.
    ``native=False`` uses the numpy reference; both give the same bits.
    """
    if not 0 <= nnz <= out_features * in_features:
        raise UserError(
            f"nnz = {nnz} positions do not fit in a {out_features} x {in_features} matrix; lower the density"
        )
    if nnz >= 2**31 or max(out_features, in_features) >= 2**31:
        raise UserError(
            f"a support of {nnz} positions in {out_features} x {in_features} is too large: int32 row pointers"
        )
    count_key, column_key = keys(support_seed, layer_name)
    if native:
        from sltrain_ds.ops import builder

        if builder.load():
            return torch.ops.sltrain.sample_support(
                out_features, in_features, nnz, _signed(count_key), _signed(column_key)
            )
    counts = row_counts(out_features, in_features, nnz, count_key)
    rows = np.zeros(out_features + 1, dtype=np.int32)
    np.cumsum(counts, out=rows[1:])
    columns = np.empty(nnz, dtype=np.uint16 if in_features <= 65536 else np.int32)
    per_chunk = max(1, _CHUNK // max(1, nnz // max(1, out_features)))
    for first in range(0, out_features, per_chunk):
        last = min(first + per_chunk, out_features)
        columns[rows[first] : rows[last]] = _columns(
            np.arange(first, last), counts[first:last], in_features, column_key
        )
    return torch.from_numpy(rows), torch.from_numpy(columns)


def sample_row(row, count, in_features, support_seed, layer_name):
    """Sorted columns of a single row, given its count, as an int64 numpy array."""
    return _columns(np.array([row]), np.array([count]), in_features, keys(support_seed, layer_name)[1]).astype(np.int64)


def row_counts(out_features, in_features, nnz, count_key):
    """Non-zeros per row, (out,) int64: multivariate hypergeometric counts of nnz cells out of out * in."""
    round_keys = _round_keys(np.array([count_key], dtype=np.uint64))
    counts = np.zeros(out_features, dtype=np.int64)
    for first in range(0, nnz, _CHUNK):
        index = np.arange(first, min(first + _CHUNK, nnz), dtype=np.uint64)
        cells = _bijection(index, out_features * in_features, round_keys)
        counts += np.bincount((cells // np.uint64(in_features)).astype(np.int64), minlength=out_features)
    return counts


def check(rows: torch.Tensor, columns: torch.Tensor, out_features: int, in_features: int) -> str | None:
    """None if (rows, columns) is a valid support of an (out, in) matrix, else the error. The kernels rely on this
    check.
    """
    if rows.dtype != torch.int32 or tuple(rows.shape) != (out_features + 1,):
        return f"S_rows must be int32 ({out_features + 1},), not {rows.dtype} {tuple(rows.shape)}"
    if columns.dtype != column_dtype(in_features) or columns.dim() != 1:
        found = f"{columns.dtype} {tuple(columns.shape)}"
        return f"S_columns must be 1-D {column_dtype(in_features)} below {in_features}, not {found}"
    pointers = rows.cpu().numpy().astype(np.int64)
    if pointers[0] != 0 or pointers[-1] != columns.numel() or (np.diff(pointers) < 0).any():
        return f"S_rows must rise from 0 to the number of columns ({columns.numel()})"
    cols = columns.cpu().numpy().astype(np.int64)
    if cols.size and (cols.min() < 0 or cols.max() >= in_features):
        return f"S_columns must lie in [0, {in_features})"
    rising = np.diff(cols) > 0
    starts = pointers[1:-1]
    rising[starts[(starts > 0) & (starts < cols.size)] - 1] = True  # a new row may start lower
    if not rising.all():
        return "S_columns must rise strictly within each row"
    return None


def checksum(rows: torch.Tensor, columns: torch.Tensor) -> int:
    """63-bit checksum (two CRC-32), equal for equal supports on every device; fits an int64 tensor for collectives."""
    high = zlib.crc32(np.ascontiguousarray(rows.detach().cpu().numpy()).data)
    low = zlib.crc32(np.ascontiguousarray(columns.detach().cpu().numpy()).data)
    return (high & 0x7FFFFFFF) << 32 | low


def to_flat_index(rows: torch.Tensor, columns: torch.Tensor, in_features: int) -> torch.Tensor:
    """int64 flat positions row * in + column, ascending, (nnz,)."""
    counts = rows[1:].long() - rows[:-1].long()
    row = torch.repeat_interleave(torch.arange(counts.numel(), device=rows.device), counts, output_size=columns.numel())
    return row * in_features + columns.long()


def from_flat_index(index: torch.Tensor, out_features: int, in_features: int):
    """Support from int64 flat positions in any order.

    Returns (rows, columns, permutation): values in the order of ``index`` become ``values[permutation]``.
    """
    index = index.detach().reshape(-1).long()
    ordered, permutation = torch.sort(index)
    if index.numel() and (int(ordered[0]) < 0 or int(ordered[-1]) >= out_features * in_features):
        span = f"{int(ordered[0])} to {int(ordered[-1])}"
        raise UserError(f"sparse index out of range for a {out_features} x {in_features} matrix: {span}")
    if index.numel() > 1 and bool((ordered[1:] == ordered[:-1]).any()):
        raise UserError("sparse index contains a position twice; every position may occur once")
    row = torch.div(ordered, in_features, rounding_mode="floor")
    rows = torch.zeros(out_features + 1, dtype=torch.int64, device=index.device)
    rows[1:] = torch.cumsum(torch.bincount(row, minlength=out_features), 0)
    columns = (ordered - row * in_features).to(torch.int32).to(column_dtype(in_features))
    return rows.to(torch.int32), columns, permutation


def _signed(key: int) -> int:
    return key - (1 << 64) if key >> 63 else key


def _mix64(z: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014) after one step of its counter."""
    z = (z + _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _mix64_array(z):
    z = z + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix32(h):
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _round_keys(key):
    """(ROUNDS, n) uint32 keys from (n,) uint64 keys."""
    return np.stack([(_mix64_array(key + np.uint64(r)) >> np.uint64(32)).astype(np.uint32) for r in range(ROUNDS)])


def _bijection(index, size, round_keys):
    """Keyed bijection of [0, size) at ``index`` (uint64 array); round_keys (ROUNDS, 1 or len(index)) uint32."""
    a = max(isqrt(size), SMALLEST_SIDE)
    b = max(-(-size // a), SMALLEST_SIDE)  # above the minimum sides, a * b exceeds size by less than a
    value = _feistel(index, a, b, round_keys)
    outside = np.nonzero(value >= size)[0]
    while outside.size:  # cycle walking: values outside are permuted again until they are inside
        walked = _feistel(value[outside], a, b, round_keys if round_keys.shape[1] == 1 else round_keys[:, outside])
        value[outside] = walked
        outside = outside[walked >= size]
    return value


def _feistel(index, a, b, round_keys):
    left = (index // np.uint64(b)).astype(np.uint32)
    right = (index % np.uint64(b)).astype(np.uint32)
    for r in range(0, ROUNDS, 2):
        left = _add_mod(left, _mix32(right ^ round_keys[r]), a)
        right = _add_mod(right, _mix32(left ^ round_keys[r + 1]), b)
    return left.astype(np.uint64) * np.uint64(b) + right


def _add_mod(x, h, m):
    """(x + floor(h * m / 2^32)) mod m"""
    total = x + (h.astype(np.uint64) * np.uint64(m) >> np.uint64(32)).astype(np.uint32)
    return np.where(total >= np.uint32(m), total - np.uint32(m), total)


def _columns(rows, counts, in_features, column_key):
    """Sorted columns of the given rows, concatenated."""
    total = int(counts.sum())
    if not total:
        return np.empty(0, dtype=np.uint64)
    row_keys = _mix64_array(np.uint64(column_key) ^ rows.astype(np.uint64))
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    index = (np.arange(total) - starts).astype(np.uint64)
    columns = _bijection(index, in_features, np.repeat(_round_keys(row_keys), counts, axis=1))
    local = np.repeat(np.arange(len(rows), dtype=np.uint64), counts)
    return np.sort(local * np.uint64(in_features) + columns) - local * np.uint64(in_features)
