"""The paper's count of parameters and memory: Table 2 of SLTrain (Han et al., NeurIPS 2024).

Its rule: GB = 1e9 bytes; 2 bytes per weight (bf16), 2 x 2 bytes of Adam moments per trained number, 8 bytes per index
(int64); no gradients, no activations. With P_full, P_low the parameters of the full-rank and the low-rank model (each
with embedding, head and norms), P_other = embedding, head and norms, nnz the non-zeros:

    full-rank   6 P_full
    low-rank    6 P_low
    SLTrain     6 (P_low + nnz) + 8 nnz
    GaLore      2 P_full + 4 P_other + sum over projections m x n of [2 min(m, n) r + 4 r max(m, n)]
                weights; moments of unprojected tensors; the projector and two moments of the projected gradient
    ReLoRA      2 (P_full + P_low) + 4 P_low
                the frozen full model and a separate low-rank model; moments of the low-rank model

ReLoRA's two parts are rounded to two decimals each and then added: at 1B 3.90 + 2.44 = 6.34, while the sum, 6.334,
would print as 6.33. This reading reproduces the printed 6.34; all other rows are rounded once.
"""

from dataclasses import dataclass

from sltrain_ds.memory.count import Shape, nonzeros

# (rank, delta) of the paper's recipes
RECIPES = {
    "llama_60m": (128, 0.03),
    "llama_130m": (256, 0.03),
    "llama_350m": (256, 0.03),
    "llama_1b": (512, 0.03),
    "llama_7b": (1024, 0.05),
}

# Figure 3: GB measured on one A100 80G at 256 tokens per step. Adam, 8-bit Adam, GaLore and SLTrain, the last three
# with 8-bit states and per-layer updates.
FIGURE_3 = {
    "llama_350m": {"adam": 4.5, "adam_8bit": 3.5, "galore": 3.1, "sltrain": 2.2},
    "llama_1b": {"adam": 16.3, "adam_8bit": 11.8, "galore": 10.3, "sltrain": 6.8},
    "llama_7b": {"adam": 67.4, "adam_8bit": 29.4, "galore": 22.0, "sltrain": 18.3},
}

METHODS = ("full_rank", "low_rank", "sltrain", "galore", "relora")


@dataclass(frozen=True)
class Row:
    """One entry of the table. `parts` are bytes by name; `split_rounding`: see the module's note on ReLoRA."""

    method: str
    parameters: int
    parts: dict[str, int]
    split_rounding: bool = False

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def millions(self) -> str:
        """Parameters in millions, to the table's one decimal."""
        return f"{self.parameters / 1e6:.1f}"

    @property
    def gigabytes(self) -> str:
        """Memory in GB of 1e9 bytes, to the table's two decimals."""
        if self.split_rounding:
            return f"{sum(round(part / 1e9, 2) for part in self.parts.values()):.2f}"
        return f"{self.bytes / 1e9:.2f}"


def table(shape: Shape, rank: int | None = None, density: float | None = None) -> dict[str, Row]:
    """Rows by method for a model of `shape` with every projection replaced; rows that need a missing rank or density
    are omitted."""
    sizes = [(w.out_features, w.in_features) for w in shape.linears(0)] * shape.layers
    # embedding, head, two norms per block and the last one; the paper's models have no biases
    other = (1 if shape.tied else 2) * shape.vocab * shape.hidden + (2 * shape.layers + 1) * shape.hidden
    full = other + sum(m * n for m, n in sizes)
    rows = {"full_rank": Row("full_rank", full, {"weights": 2 * full, "moments": 4 * full})}
    if rank is None:
        return rows
    low = other + sum(rank * (m + n) for m, n in sizes)
    rows["low_rank"] = Row("low_rank", low, {"weights": 2 * low, "moments": 4 * low})
    if density is not None:
        nnz = sum(nonzeros(density, m, n) for m, n in sizes)
        kept = low + nnz
        rows["sltrain"] = Row("sltrain", kept, {"weights": 2 * kept, "moments": 4 * kept, "index": 8 * nnz})
    projected = sum(2 * rank * max(m, n) for m, n in sizes)
    projectors = sum(rank * min(m, n) for m, n in sizes)
    rows["galore"] = Row(
        "galore", full, {"weights": 2 * full, "moments": 4 * other + 2 * projected, "projectors": 2 * projectors}
    )
    rows["relora"] = Row("relora", full, {"weights": 2 * (full + low), "moments": 4 * low}, split_rounding=True)
    return rows
