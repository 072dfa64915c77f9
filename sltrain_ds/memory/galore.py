"""Computed size of the states of 8-bit GaLore, which this package does not implement.

GaLore (Zhao et al., ICML 2024) projects the gradient of every projection m x n to r x max(m, n). It keeps two 8-bit
moments of that size and the projector, r x min(m, n) in the weights' dtype. Embedding and head have full-size 8-bit
moments, norms 32-bit ones.
"""

from sltrain_ds.formats import STATES
from sltrain_ds.memory.count import Shape
from sltrain_ds.memory.paper import RECIPES

_EIGHT_BIT = 2 * (1 + 4 / STATES["8bit"].block)  # bytes per number: two moments, an fp32 absmax per 256


def galore_bytes(run, shape: Shape, rank: int | None = None) -> int:
    """Bytes of projectors and moments of a model of `shape` on one GPU; rank defaults to the paper's for the preset,
    else hidden / 4."""
    rank = rank or RECIPES.get(run.sltrain.model.preset, (shape.hidden // 4, None))[0]
    sizes = [(w.out_features, w.in_features) for w in shape.linears(0)] * shape.layers
    wide = (1 if shape.tied else 2) * shape.vocab * shape.hidden
    norms = (2 * shape.layers + 1) * shape.hidden
    moments = _EIGHT_BIT * (wide + sum(rank * max(size) for size in sizes)) + 8 * norms
    return int(moments) + (2 if run.bf16 else 4) * sum(rank * min(size) for size in sizes)
