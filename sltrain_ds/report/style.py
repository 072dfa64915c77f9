"""Common style of all plots: Matplotlib's Agg canvas and a palette safe for colour-blind readers."""

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito's palette without black and yellow: distinguishable under the common colour blindnesses
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", "--", "-.", ":")
INK, FAINT, GRID = "#222222", "#777777", "#DDDDDD"
HEAT = "magma"  # perceptually uniform, readable in grey too
_DPI = 110


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def dashes(index: int) -> str:
    """Line style; changes each time the colours repeat."""
    return DASHES[index // len(COLOURS) % len(DASHES)]


def figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """An empty figure, size in inches; layout "constrained" fits every label, None is twice as fast."""
    fig = Figure(figsize=(width, height), dpi=_DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(fig)
    return fig


def axes(ax, title="", x="", y=""):
    """Style axes: title on the left, labels, faint grid, no box."""
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    ax.tick_params(labelsize=8, colors=INK, length=3)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    return ax


def plain_log(ax):
    """Make the y axis logarithmic with plain numbers as labels: 0.3, not 3 x 10^-1."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else ""))
    ax.tick_params(which="minor", labelsize=8, colors=INK, length=2)


def legend(ax, **keys):
    """Add a frameless legend, if any line has a label."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8, frameon=False, **keys)


def save(fig: Figure, path: Path) -> Path:
    """Write the figure as PNG, atomically."""
    partial = path.with_name(f".{path.name}.partial")
    fig.savefig(partial, format="png")
    os.replace(partial, path)
    return path
