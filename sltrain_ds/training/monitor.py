"""What a run reports: metrics.jsonl, DeepSpeed's monitors and the progress bar, each a callback."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from sltrain_ds.files import write_text
from sltrain_ds.training.callbacks import Callback


class Metrics(Callback):
    """Appends lines to RUN_DIR/metrics.jsonl and hands the numbers to DeepSpeed's monitors; only rank 0 writes.

    `resumed_step` is the step of the checkpoint a run goes on from: later lines of an earlier run are dropped.
    """

    def __init__(self, run_dir: Path, engine, rank: int, resumed_step: int | None):
        self.engine, self.writes = engine, rank == 0
        self.path = run_dir / "metrics.jsonl"
        if self.writes:
            kept = [] if resumed_step is None else _lines_up_to(self.path, resumed_step)
            write_text(self.path, "".join(kept))

    def step_end(self, training, step, numbers):
        self.log(step, **numbers)

    def evaluated(self, training, step, result):
        self.log(step, eval_loss=result.loss, eval_perplexity=result.perplexity, eval_tokens=result.tokens)

    def log(self, step: int, **values) -> None:
        """Write a line of {"step": step, **values}."""
        if not self.writes:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.engine.monitor.enabled:
            numbers = [(f"Train/{k}", v, step) for k, v in values.items() if isinstance(v, int | float)]
            self.engine.monitor.write_events(numbers)


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The lines a resumed run keeps: those after its checkpoint are about to be written again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue  # the half line of a killed run
    return kept


class Progress(Callback):
    """A bar with loss, tokens a second, memory and the time left; on a log file, a line now and then."""

    def __init__(self, steps: int, start: int, rank: int):
        live = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=start, disable=rank != 0, unit="step", dynamic_ncols=live,
            mininterval=0.5 if live else 10.0, file=sys.stderr,
        )  # fmt: skip

    def step_end(self, training, step, numbers):
        loss, rate, peak = numbers["loss"], numbers["tokens_per_second"], numbers["memory"]["peak"]
        self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tok/s, {peak / 1e9:.2f} GB", refresh=False)
        self.bar.update()

    def evaluated(self, training, step, result):
        self.say(f"step {step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}")

    def say(self, text: str) -> None:
        if not self.bar.disable:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
