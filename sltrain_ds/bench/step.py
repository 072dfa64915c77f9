"""Benchmark of whole training steps on the real engine: full-rank, SLTrain, and SLTrain with the naive operator."""

import contextlib
import copy
import gc
import os
import socket
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch

from sltrain_ds.bench.meter import Meter
from sltrain_ds.bench.naive import to_naive
from sltrain_ds.bench.pairs import interleave, ratio
from sltrain_ds.bench.report import Report, megabytes
from sltrain_ds.config import from_dict
from sltrain_ds.config.jsonfile import read_json
from sltrain_ds.config.overrides import apply
from sltrain_ds.data.dataset import BatchSource
from sltrain_ds.data.random_tokens import RandomTokens
from sltrain_ds.errors import UserError
from sltrain_ds.memory.estimate import estimate
from sltrain_ds.memory.free import free_bytes
from sltrain_ds.models import build as models
from sltrain_ds.models.chunked_loss import use_chunked_loss
from sltrain_ds.ops import modes, workspace
from sltrain_ds.training.stepper import Stepper
from sltrain_ds.zero.held import held_bytes
from sltrain_ds.zero.initialize import initialize, partitioner

METHODS = ("full_rank", "sltrain", "naive")
COLUMNS = [
    "config", "method", "M params", "tokens", "data", "ms a step", "tokens/s", "x naive's speed", "x full-rank's time",
    "held MB", "peak MB", "engines",
]  # fmt: skip
ROOM = 0.9  # fraction of the free memory to use; the rest is for memory that the estimate does not count


def bench(configs, overrides, methods, device, steps, out=None) -> list[dict]:
    """Measure every config with every method; print the table and return the cases (see docs/benchmarks.md)."""
    _be_the_only_rank()
    report = Report("step", COLUMNS, device, out)
    for path in configs:
        case = measure(path, apply(read_json(path), overrides), methods, device, steps)
        report.add(case, table_rows(case))
    return report.cases


def measure(path, data: dict, methods, device, steps: int) -> dict:
    """One case: per method its `times` (seconds per step, paired by position if `engines` is "together") and bytes."""
    runs = {method: variant(path, data, method) for method in methods}
    needs = {method: estimate(run).peak for method, run in runs.items()}
    free = ROOM * free_bytes(device)
    left_out = {method: need for method, need in needs.items() if need > free}
    for method, need in left_out.items():
        print(f"{path}: {method} needs {need / 1e9:.1f} GB of {free / 1e9:.1f}: left out", file=sys.stderr)
    runs = {method: run for method, run in runs.items() if method not in left_out}
    together = sum(needs[method] for method in runs) <= free
    found = {}
    for group in [list(runs)] if together else [[method] for method in runs]:
        engines = {method: Engine(runs[method], method == "naive", device) for method in group}
        times = interleave({m: engine.step for m, engine in engines.items()}, steps, float("inf"), device, burst=0.0)
        for method, engine in engines.items():
            found[method] = {"times": times[method], **engine.facts}
        for engine in engines.values():
            engine.close()
    return {"config": str(path), "engines": "together" if together else "one by one", "steps": steps,
            "left_out": left_out, "methods": found}  # fmt: skip


def variant(path, data: dict, method: str):
    """The file's `RunConfig` with method "full_rank", or with its own, which must be sltrain."""
    data = copy.deepcopy(data)
    own = data.get("sltrain", {}).get("method", {})
    if method == "full_rank":
        data["sltrain"]["method"] = {"name": "full_rank"}
    elif own.get("name") != "sltrain":
        raise UserError(f"sltrain.method.name: {path} holds {own.get('name')!r}; bench step needs a file of sltrain")
    return from_dict(data, world_size=1, name=str(path))


class Engine:
    """A run's engine and batches; `step()` is one optimizer step as the training loop does it.

    `facts`: parameters, tokens per step, kind of data, `held` bytes (weights, index, states, masters) and `peak` bytes
    (of the third step).
    """

    def __init__(self, run, naive: bool, device):
        self.run, self.done = run, 0
        self.source, kind = _source(run)
        workspace.release()
        with Meter(device) as meter:
            with contextlib.redirect_stdout(sys.stderr):
                model = models.build(run, device, partitioner(run))
                if run.sltrain.loss == "chunked":
                    use_chunked_loss(model)
                self.engine, *_ = initialize(model=model, config=run)
            if naive:
                to_naive(model)
            self.stepper, self.last = Stepper(self.engine, run, self.source), None
            self.step()
            self.step()
            meter.mark()
            self.step()
        held = held_bytes(self.engine)
        self.facts = {
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
            "modes": {} if naive else dict(Counter(modes.chosen(model).values())),  # mode -> layers
            "tokens": run.tokens_per_step,
            "data": kind,
            "held": sum(held[key] for key in ("weights", "index", "states", "masters")) + _naive_index(model),
            "peak": meter.peak,
        }

    def step(self) -> None:
        before, self.last = self.last, self.stepper.step(self.done)
        _ = before and before.loss  # one step late, as the loop reads it
        self.done += 1

    def close(self) -> None:
        self.engine.destroy()
        self.engine = self.stepper = self.last = None
        workspace.release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def table_rows(case: dict) -> list[list]:
    """One row per method: medians, speed relative to naive, time relative to full-rank."""
    rows, found = [], case["methods"]
    for method, one in found.items():
        median = statistics.median(one["times"])
        naive, dense = (found[name]["times"] if name in found else None for name in ("naive", "full_rank"))
        rows.append([
            Path(case["config"]).stem, _label(method, one["modes"]), one["parameters"] / 1e6,
            one["tokens"], one["data"], 1e3 * median, one["tokens"] / median,
            naive and ratio(naive, one["times"]), dense and ratio(one["times"], dense),
            megabytes(one["held"]), megabytes(one["peak"]), case["engines"],
        ])  # fmt: skip
    return rows


def _label(method, chosen) -> str:
    return f"{method}: {', '.join(f'{mode} {n}' for mode, n in chosen.items())}" if chosen else method


def _source(run):
    try:
        return BatchSource(run), "prepared"
    except UserError:
        return RandomTokens(run), "random"


def _naive_index(model) -> int:
    return sum(b.nbytes for name, b in model.named_buffers() if name.endswith("S_index"))


def _be_the_only_rank() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("WORLD_SIZE: bench step measures one rank; start it without the launcher")
    for key, value in alone().items():
        os.environ.setdefault(key, value)


def alone() -> dict[str, str]:
    """Environment variables that the launcher would set for one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
