"""Plots of loss, learning rate and gradient norm over the run; several runs share one plot."""

import math

import numpy as np

from sltrain_ds.report import style
from sltrain_ds.report.runs import Run


def loss(runs: list[Run]):
    """Plot training loss (thin: every step, thick: smoothed), validation loss (dots), n-gram baselines (grey)."""
    fig = style.figure(8.4, 4.4)
    ax = style.axes(fig.add_subplot(), "Loss", "optimizer step", "cross-entropy, nats a token")
    lows, highs = [], []
    for index, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        steps, values = run.column("loss")
        if steps:
            smooth = smoothed(values)
            ax.plot(steps, values, color=style.colour(index), alpha=0.22, linewidth=0.8)
            ax.plot(steps, smooth, style.dashes(index), color=style.colour(index), linewidth=1.8,
                    label=f"{prefix}train")  # fmt: skip
            lows.append(np.nanmin(smooth) if np.isfinite(smooth).any() else math.nan)
            highs.append(values[0])
        at, evals = run.column("eval_loss", "evals")
        if at:
            ax.plot(at, evals, "o", color=style.colour(index), markeredgecolor="white", markersize=7,
                    label=f"{prefix}validation")  # fmt: skip
            lows.append(np.nanmin(evals))
            highs.append(evals[0])
    for at, (name, perplexity) in enumerate(_baselines(runs)):
        level = math.log(perplexity)
        ax.axhline(level, color=style.FAINT, linewidth=1, linestyle=("--", ":")[at % 2])
        ax.annotate(f"{name} {level:.2f}", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                    fontsize=8, color=style.FAINT)  # fmt: skip
        lows.append(level)
    lows, highs = [v for v in lows if np.isfinite(v)], [v for v in highs if np.isfinite(v)]
    if lows and highs:
        # the axis ignores later spikes, which would flatten the rest
        span = max(max(highs) - min(lows), 1e-3)
        ax.set_ylim(min(lows) - 0.05 * span, max(highs) + 0.08 * span)
    style.legend(ax, loc="upper right")
    return fig


def schedule(runs: list[Run]):
    """Plot learning rate and gradient norm."""
    fig = style.figure(8.4, 3.2)
    left, right = fig.subplots(1, 2)
    style.axes(left, "Learning rate", "optimizer step")
    style.axes(right, "Gradient norm before clipping", "optimizer step")
    for index, run in enumerate(runs):
        look = dict(color=style.colour(index), linestyle=style.dashes(index))
        left.plot(*run.column("lr"), linewidth=1.8, label=run.name, **look)
        steps, norms = run.column("grad_norm")
        right.plot(steps, norms, linewidth=0.8, alpha=0.25, color=style.colour(index))
        right.plot(steps, smoothed(norms), linewidth=1.8, label=run.name, **look)
        bound = run.config.get("gradient_clipping")
        if isinstance(bound, int | float) and bound > 0 and index == 0:
            right.axhline(bound, color=style.FAINT, linewidth=1, linestyle="--")
            right.annotate(f"clipped at {bound:g}", (1, bound), xycoords=("axes fraction", "data"), ha="right",
                           va="bottom", fontsize=8, color=style.FAINT)  # fmt: skip
    if any(np.nanmax(line.get_ydata(), initial=0) > 0 for line in right.get_lines()):
        style.plain_log(right)
    left.set_ylim(bottom=0)
    left.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    left.yaxis.get_offset_text().set_fontsize(8)
    if len(runs) > 1:
        style.legend(left, loc="best")
    return fig


def smoothed(values) -> np.ndarray:
    """Centred moving average over 1/40 of the run, shorter at its ends; non-finite values are excluded."""
    values = np.asarray(values, dtype=float)
    half = max(1, len(values) // 80)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def _baselines(runs):
    found = {}
    for run in runs:
        for name, perplexity in run.baselines.items():
            if perplexity > 0:
                found.setdefault((name, round(perplexity, 2)), name)
    return [(name, perplexity) for name, perplexity in found]
