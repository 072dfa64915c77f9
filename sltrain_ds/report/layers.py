"""Plots of trained matrices: spectra by part, heat maps, the residual's magnitudes."""

import numpy as np

from sltrain_ds.report import style
from sltrain_ds.report.spectra import Analysis

# field of Analysis, label, line style, and colour if there is only one run
_PARTS = (
    ("singular", "W", "-", style.INK),
    ("low_rank", "from BA", "--", style.COLOURS[0]),
    ("sparse", "from S", ":", style.COLOURS[1]),
)


def matrix(found: dict[str, Analysis]):
    """Plot one matrix of every run (`found`: run name -> analysis): spectrum, tail and residual; heat maps below."""
    height = 3.4 + 2.8 * len(found)
    fig = style.figure(10.4, height, layout=None)
    # inches: 0.3 and 0.5 for titles and labels of the upper row, 2.8 per row of heat maps
    upper = fig.add_gridspec(1, 3, left=0.06, right=0.985, wspace=0.28, top=1 - 0.3 / height, bottom=1 - 2.9 / height)
    lower = fig.add_gridspec(len(found), 2, left=0.06, right=0.985, wspace=0.14, hspace=0.32, top=1 - 3.7 / height,
                             bottom=0.5 / height)  # fmt: skip
    spectrum, tail, residual = (fig.add_subplot(upper[0, i]) for i in range(3))
    style.axes(spectrum, "Singular values", "index")
    style.axes(tail, "Tail, beyond r", "index")
    style.axes(residual, "Residual W - best rank r", "magnitude", "share of entries below")
    for index, (run, a) in enumerate(found.items()):
        _spectrum(spectrum, a, run, index, len(found) > 1, 0)
        _spectrum(tail, a, run, index, len(found) > 1, a.rank)
        spectrum.axvline(a.rank, color=style.FAINT, linewidth=0.8)
        cumulative(residual, a, run if len(found) > 1 else None, index)
    style.legend(spectrum)
    style.legend(residual, loc="lower right")
    residual.set_ylim(0, 1.02)
    for index, (run, a) in enumerate(found.items()):
        prefix = f"{run}: " if len(found) > 1 else ""
        heat(fig.add_subplot(lower[index, 0]), a.weight_map, a, f"{prefix}|W|")
        heat(fig.add_subplot(lower[index, 1]), a.residual_map, a, f"{prefix}|W - best rank {a.rank}|")
    return fig


def _spectrum(ax, a, run, index, several, start):
    at = np.arange(1, len(a.singular) + 1)
    for key, label, dash, one in _PARTS:
        values = getattr(a, key)
        if values is not None:
            look = (
                {"color": style.colour(index), "label": f"{run}: {label}"}
                if several
                else {"color": one, "label": label}
            )
            ax.plot(at[start:], values[start:], dash, linewidth=1.6 if key == "singular" else 1.3, **look)
    if start == 0:
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))


def cumulative(ax, a: Analysis, label, index):
    """Plot the cumulative density of |W - W_r| and mark its 97% quantile."""
    at = a.quantile(0.97)
    ax.plot(a.magnitudes, a.cumulative, style.dashes(index), color=style.colour(index), linewidth=1.6,
            label=f"{label}: 97% below {at:.3g}" if label else f"97% below {at:.3g}")  # fmt: skip
    ax.plot([at], [0.97], "o", color=style.colour(index), markersize=4.5, markeredgecolor="white")
    # the few largest entries would compress the rest against the axis
    ax.set_xlim(0, max(ax.get_xlim()[1] * (index > 0), 1.15 * a.quantile(0.9995)))


def heat(ax, values, a: Analysis, title):
    """Plot a heat map of magnitudes, its colours clipped at the 99.5th percentile."""
    top = float(np.quantile(values, 0.995)) or 1.0
    rows, columns = a.shape
    style.axes(ax, title, "in", "out").grid(False)
    ax.imshow(values, cmap=style.HEAT, vmin=0, vmax=top, aspect="auto", interpolation="nearest",
              extent=(0, columns, rows, 0))  # fmt: skip
    cell = "" if a.cell == (1, 1) else f", mean of {a.cell[0]} x {a.cell[1]}"
    ax.set_title(f"black 0, white {top:.2g}{cell}", loc="right", fontsize=8, color=style.FAINT)


def overview(found: dict[str, list[Analysis]]):
    """Plot all shown matrices of every run: pooled magnitudes of the residual, and the share of S in each tail."""
    fig = style.figure(8.4, 3.4)
    left, right = fig.subplots(1, 2)
    style.axes(left, "Residual W - best rank r, matrices pooled", "magnitude", "share of entries below")
    style.axes(right, "Share of S beyond r", "matrix, in the model's order", "of the tail's singular values")
    for index, (run, analyses) in enumerate(found.items()):
        cumulative(left, pooled(analyses), run if len(found) > 1 else None, index)
        shares = [(i, a.tail_from_sparse) for i, a in enumerate(analyses) if a.tail_from_sparse is not None]
        if shares:
            right.plot(*zip(*shares, strict=True), "o", color=style.colour(index), markersize=4.5, label=run)
    left.set_ylim(0, 1.02)
    right.set_ylim(0, 1.05)
    right.xaxis.get_major_locator().set_params(integer=True)
    style.legend(left, loc="lower right")
    if not right.get_lines():
        right.set_axis_off()
        right.text(0, 0.5, "no run here has a sparse part", transform=right.transAxes, fontsize=9, color=style.FAINT)
    return fig


def pooled(analyses: list[Analysis]) -> Analysis:
    """One cumulative density over all entries of several matrices; the other fields are the first matrix's."""
    magnitudes = np.unique(np.concatenate([a.magnitudes for a in analyses]))
    weights = np.array([a.shape[0] * a.shape[1] for a in analyses], dtype=float)
    shares = np.array([np.interp(magnitudes, a.magnitudes, a.cumulative, left=0, right=1) for a in analyses])
    first = analyses[0]
    return Analysis(**{**vars(first), "magnitudes": magnitudes, "cumulative": weights @ shares / weights.sum()})
