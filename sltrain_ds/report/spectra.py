"""The paper's analysis of a trained W: singular values by part, and the residual of the best rank-r approximation."""

from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from sltrain_ds.report.weights import Layer

_POINTS = 400  # per cumulative density
_PIXELS = 128  # maximum per side of a heat map


@dataclass(frozen=True)
class Analysis:
    """Analysis of one W (out, in); m = min(out, in).

    singular (m,)        singular values, u_i' W v_i
    low_rank (m,)        u_i' (s B A) v_i, and `sparse` (m,) u_i' S v_i; with W's u and v they add up to `singular`
    rank                 r of the approximation W_r; `residual` = W - W_r
    weight_map, residual_map    |W| and |W - W_r|, averaged over cells of `cell` entries
    magnitudes, cumulative      points of the cumulative density of |W - W_r|
    """

    name: str
    shape: tuple[int, int]
    rank: int
    singular: np.ndarray
    low_rank: np.ndarray | None
    sparse: np.ndarray | None
    weight_map: np.ndarray
    residual_map: np.ndarray
    cell: tuple[int, int]
    magnitudes: np.ndarray
    cumulative: np.ndarray

    def quantile(self, share: float) -> float:
        """Magnitude below which `share` of the residual's entries lie."""
        return float(np.interp(share, self.cumulative, self.magnitudes))

    @property
    def tail_from_sparse(self) -> float | None:
        """Share of S in the sum of the singular values after the first r."""
        tail = self.singular[self.rank :].sum()
        return None if self.sparse is None or tail == 0 else float(self.sparse[self.rank :].sum() / tail)


def analyse(layer: Layer, rank: int | None = None) -> Analysis:
    """Analyse one W. The default `rank` is min(out, in) / 4, the paper's choice at 60M."""
    W = layer.W
    rank = max(1, min(W.shape) // 4) if rank is None else min(rank, min(W.shape))
    U, singular, Vt = np.linalg.svd(W, full_matrices=False)
    residual = np.abs(W - (U[:, :rank] * singular[:rank]) @ Vt[:rank])

    def along(part):
        return None if part is None else np.einsum("ij,ij->j", U, part @ Vt.T)

    cell = tuple(-(-size // _PIXELS) for size in W.shape)
    cumulative = np.concatenate([np.linspace(0, 0.99, _POINTS // 2), np.linspace(0.99, 1, _POINTS // 2 + 1)[1:]])
    return Analysis(
        layer.name, W.shape, rank, singular, along(layer.low_rank), along(layer.sparse),
        coarse(np.abs(W), cell), coarse(residual, cell), cell, np.quantile(residual, cumulative), cumulative,
    )  # fmt: skip


def coarse(matrix: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """Means over cells of (rows, columns) entries; cells at the right and bottom edges may be smaller."""
    rows, columns = np.arange(0, matrix.shape[0], cell[0]), np.arange(0, matrix.shape[1], cell[1])
    sums = np.add.reduceat(np.add.reduceat(matrix, rows, axis=0), columns, axis=1)
    counts = np.outer(np.diff([*rows, matrix.shape[0]]), np.diff([*columns, matrix.shape[1]]))
    return sums / counts


def cost(shape: tuple[int, int]) -> int:
    """Cost of a singular value decomposition, up to a constant."""
    return min(shape) ** 2 * max(shape)


def choose(shapes: dict[str, tuple[int, int]], patterns, budget: float) -> list[str]:
    """Names to analyse, in the model's order.

    With patterns: the names that match one of them (whole components such as "layers.0", "q_proj"; or "all").
    Without: as many as `budget` allows, spread over the depth, and at least two.
    """
    if patterns:
        return [n for n in shapes if any(p == "all" or f".{p}." in f".{n}." for p in patterns)]
    taken, spent = set(), 0
    for name in _spread(list(shapes)):
        spent += cost(shapes[name])
        if spent > budget and len(taken) >= 2:
            break
        taken.add(name)
    return [name for name in shapes if name in taken]


def _spread(names):
    """Names block by block: the middle block, the first, the last, the quarters, then the rest."""
    blocks = {}
    for name in names:
        blocks.setdefault(next((part for part in name.split(".") if part.isdigit()), ""), []).append(name)
    blocks = list(blocks.values())
    count = len(blocks)
    order = [count // 2, 0, count - 1, count // 4, 3 * count // 4, *range(count)]
    for index in dict.fromkeys(i for i in order if 0 <= i < count):
        parts = {}
        for name in blocks[index]:
            parts.setdefault(name.rpartition(".")[0], []).append(name)
        # alternates attention and MLP, so that two names are one of each
        yield from (name for row in zip_longest(*parts.values()) for name in row if name)
