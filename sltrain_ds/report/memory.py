"""Memory by category: a run's estimate, the dense model's estimate, and the run's measurement."""

from sltrain_ds.errors import UserError
from sltrain_ds.memory.estimate import CATEGORIES, Estimate, estimate
from sltrain_ds.report import style
from sltrain_ds.report.runs import Run

# strong colours for states and masters, in which the methods differ
_SHADES = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#8CD1B8", "#BBBBBB", "#CC79A7")
_COLOURS = dict(zip(CATEGORIES, _SHADES, strict=True))


def estimates(runs: list[Run]) -> dict[str, Estimate]:
    """Estimates by run name; a run whose config cannot be estimated gets a note instead."""
    from sltrain_ds.config import from_dict

    found = {}
    for run in runs:
        try:
            found[run.name] = estimate(from_dict(run.config, world_size=run.world_size))
        except UserError as error:
            run.notes.append(f"no memory estimate: {error}")
    return found


def measured(run: Run) -> dict[str, int]:
    """Memory of the last step that recorded it: bytes by category, and the `peak`."""
    for line in reversed(run.steps):
        if isinstance(line.get("memory"), dict):
            return {key: int(value) for key, value in line["memory"].items() if isinstance(value, int | float)}
    return {}


def bars(runs: list[Run], found: dict[str, Estimate]):
    """Plot one GPU's bytes as stacked bars; None if there is nothing to show."""
    rows = []
    for run in runs:
        if run.name in found:
            rows.append((f"{run.name}: estimate", found[run.name].bytes))
            if found[run.name].dense.bytes != found[run.name].bytes:
                rows.append((f"{run.name}: dense, estimate", found[run.name].dense.bytes))
        held = {key: size for key, size in measured(run).items() if key in CATEGORIES}
        if held:
            rows.append((f"{run.name}: measured, held", held))
    if not rows:
        return None
    largest = max(sum(sizes.values()) for _, sizes in rows)
    unit, word = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    fig = style.figure(8.4, 1.5 + 0.34 * len(rows))
    ax = style.axes(fig.add_subplot(), "Memory of one GPU by category", f"{word} ({unit:.0e} bytes)".replace("+0", ""))
    for at, (_, sizes) in enumerate(rows):
        left = 0.0
        for category in CATEGORIES:
            width = sizes.get(category, 0) / unit
            ax.barh(at, width, left=left, height=0.7, color=_COLOURS[category], label=category if at == 0 else None)
            left += width
        ax.annotate(f"{left:,.1f}", (left, at), xytext=(4, 0),
                    textcoords="offset points", va="center", fontsize=8, color=style.INK)  # fmt: skip
    ax.set_yticks(range(len(rows)), [label for label, _ in rows])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlim(0, largest / unit * 1.1)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8, frameon=False,
               handlelength=1, columnspacing=1.2)  # fmt: skip
    return fig
