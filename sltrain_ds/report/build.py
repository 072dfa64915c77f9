"""`build`: turns run directories into PNGs and one HTML page."""

import statistics
from pathlib import Path

from sltrain_ds.errors import UserError
from sltrain_ds.files import write_text
from sltrain_ds.report import curves, layers, memory, style
from sltrain_ds.report.page import Section, number, page
from sltrain_ds.report.runs import Run, read
from sltrain_ds.report.spectra import Analysis, analyse, choose
from sltrain_ds.report.weights import open_weights

BUDGET = 4.1e8  # in units of spectra.cost, so that a page takes seconds: two of the quickstart's four blocks


def build(run_dirs, out: str | Path, patterns=(), rank: int | None = None) -> Path:
    """Write `out`/index.html and the PNGs next to it; returns the path of the page.

    `patterns` select matrices by name components ("all", "layers.0", "q_proj"); without any, a sample that takes
    seconds. `rank` is the residual's r for methods without a rank. Raises `UserError` for unreadable input.
    """
    runs, out = read(run_dirs), Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a directory")
    analysed, sample = _analyse(runs, patterns, rank)
    out.mkdir(parents=True, exist_ok=True)
    estimates = memory.estimates(runs)
    written = []

    def draw(name, fig):
        written.append(style.save(fig, out / name))
        return name, written[-1]

    sections = [Section("Loss", images=(draw("loss.png", curves.loss(runs)),))]
    sections.append(Section("Learning rate and gradient norm", images=(draw("schedule.png", curves.schedule(runs)),)))
    bars = memory.bars(runs, estimates)
    if bars is not None:
        sections.append(Section("Memory", _MEMORY, (draw("memory.png", bars),)))
    sections += _weight_sections(analysed, sample, draw)
    for old in set(out.glob("matrix-*.png")) - set(written):
        old.unlink()  # left by an earlier report on other matrices
    notes = [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
    title = "Run " + runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    lead = ", ".join(str(run.dir) for run in runs)
    write_text(out / "index.html", page(title, lead, _table(runs, estimates), sections, notes))
    return out / "index.html"


_MEMORY = """
Bars marked <em>estimate</em> are computed from the config (<code>sltrain-ds estimate</code>), first for the run, then
for the dense model under the same config. <em>measured, held</em>: tensors resident on a rank at the run's last step,
without gradients, buckets and activations, which are temporary.
"""
_SPECTRA = """
Singular values of each trained W with vectors u, v. The dashed and dotted lines are the contributions of BA and S,
u<sub>i</sub><sup>T</sup>(sBA)v<sub>i</sub> and u<sub>i</sub><sup>T</sup>Sv<sub>i</sub>; they add up to the solid line.
The grey line marks r. Heat maps show magnitudes, averaged over cells if the matrix is larger than the picture.
"""


def _analyse(runs: list[Run], patterns, rank) -> tuple[dict[str, dict[str, Analysis]], str]:
    """Analyses as {matrix name: {run name: analysis}}, and a sentence on which matrices are shown."""
    opened, analysed, sample = {}, {}, ""
    for run in runs:
        opened[run.name], notes = open_weights(run.dir)
        run.notes += notes
        if opened[run.name] is None:
            run.notes.append("no checkpoint and no export found, so its weights are not shown")
    opened = {name: weights for name, weights in opened.items() if weights is not None}
    ranks = [r for weights in opened.values() for r in weights.ranks.values() if r]
    shapes = {}
    for weights in opened.values():
        shapes |= weights.shapes
    chosen = choose(shapes, patterns, BUDGET / max(1, len(opened)))
    if patterns and opened and not chosen:
        raise UserError(f"--layers {' '.join(patterns)}: matches no matrix; names are like {next(iter(shapes))}")
    if opened:
        sample = f"{len(chosen)} of {len(shapes)} matrices"
        if len(chosen) < len(shapes):
            how = "as chosen" if patterns else "a sample spread over the depth that takes seconds"
            sample += f", {how}; choose with <code>--layers</code>"
    for name in chosen:
        for run, weights in opened.items():
            if name in weights.shapes:
                r = weights.ranks[name] or rank or max(ranks, default=None)
                analysed.setdefault(name, {})[run] = analyse(weights.read(name), r)
    return analysed, sample


def _weight_sections(analysed, sample, draw) -> list[Section]:
    if not analysed:
        return []
    by_run, blocks = {}, {}
    for name, found in analysed.items():
        for run, analysis in found.items():
            by_run.setdefault(run, []).append(analysis)
        image = draw(f"matrix-{name.replace('model.layers.', '')}.png", layers.matrix(found))[1]
        block = next((part for part in name.split(".") if part.isdigit()), None)
        blocks.setdefault("Block " + block if block else "Others", []).append((name, image))
    overview = Section("Weights", f"Shown: {sample}.", (draw("residual.png", layers.overview(by_run)),))
    folds = tuple((block, tuple(images)) for block, images in blocks.items())
    return [overview, Section("Weights, matrix by matrix", _SPECTRA, folds=folds)]


_COLUMNS = (
    "run", "method", "steps", "tokens (M)", "train loss", "val. loss", "val. perplexity", "before", "unigram", "bigram",
    "params (M)", "of dense", "tokens/s", "peak GB, measured", "GB, estimate", "dense GB, estimate",
)  # fmt: skip


def _table(runs, estimates):
    return list(_COLUMNS), [_row(run, estimates.get(run.name)) for run in runs]


def _row(run: Run, estimate):
    _, losses = run.column("loss")
    _, evals = run.column("eval_loss", "evals")
    _, perplexities = run.column("eval_perplexity", "evals")
    _, rates = run.column("tokens_per_second")
    _, tokens = run.column("tokens")
    lines = run.steps + run.evals
    parameters = sum(estimate.parameters.values()) if estimate else None
    dense = sum(estimate.dense.parameters.values()) if estimate else None
    peak = memory.measured(run).get("peak")
    return [
        run.name,
        run.method,
        f"{max(line['step'] for line in lines):,}",
        number(tokens[-1] / 1e6 if tokens else None),
        number(statistics.fmean(losses[-max(1, len(losses) // 40) :]) if losses else None, ".3f"),
        number(evals[-1] if evals else None, ".3f"),
        number(perplexities[-1] if perplexities else None),
        number(perplexities[0] if len(perplexities) > 1 else None, ",.1f"),
        number(run.baselines.get("unigram"), ",.1f"),
        number(run.baselines.get("bigram"), ",.1f"),
        number(parameters and parameters / 1e6),
        number(parameters and parameters / dense, ".0%"),
        number(statistics.median(rates) if rates else None, ",.0f"),
        number(peak and peak / 1e9),
        number(estimate and estimate.peak / 1e9),
        number(estimate and estimate.dense.peak / 1e9),
    ]
