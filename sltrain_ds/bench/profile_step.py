"""Profile of one config's steps: bytes, ms, tokens/s, MFU, launches and waits, for several methods side by side.

Each method's engine is built once, as in a run, and takes steps of random tokens at every size: one micro-batch of
sequences of at most `sequence` tokens, with op_mode chosen again for the size. The first method is first measured
alone, with its bytes; then all in rounds. All sizes thus share one process and one model per method.
"""

import contextlib
import copy
import gc
import statistics
import sys
import time
from collections import Counter, defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from sltrain_ds.bench import flops
from sltrain_ds.bench.pairs import interleave, ratio
from sltrain_ds.bench.report import Report, megabytes
from sltrain_ds.bench.step import ROOM, variant
from sltrain_ds.config.jsonfile import read_json
from sltrain_ds.config.overrides import apply
from sltrain_ds.data.random_tokens import RandomTokens
from sltrain_ds.errors import UserError
from sltrain_ds.memory.estimate import estimate
from sltrain_ds.memory.free import free_bytes
from sltrain_ds.memory.gauge import Gauge, resident
from sltrain_ds.ops import modes, workspace
from sltrain_ds.training.engine import make_engine
from sltrain_ds.training.stepper import Stepper
from sltrain_ds.zero.agree_on_modes import agree_on_modes
from sltrain_ds.zero.start import start

METHODS = ("sltrain", "full_rank")
COLUMNS = [
    "method", "tokens", "beside", "ms", "tokens/s", "MFU", "x full-rank's time", "own TFLOP", "allocated MB",
    "active MB", "reserved MB", "device MB", "launches", "waits", "kernels", "kernels' ms", "busy",
]  # fmt: skip
TOP = 20  # kernels listed by name


def bench(path, overrides, methods, tokens, sequence, device, rounds=5, seconds=10.0, out=None) -> list[dict]:
    """Measure every method at every number of tokens; print the table and return the cases (docs/benchmarks.md)."""
    data = apply(read_json(path), overrides)
    runs = {method: [sized(path, data, method, count, sequence) for count in tokens] for method in methods}
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"
    with contextlib.redirect_stdout(sys.stderr):
        start()
    report = Report("profile", COLUMNS, device, out)
    for group in groups(path, runs, device):
        _measure({method: runs[method] for method in group}, device, rounds, seconds, report)
    return report.cases


def sized(path, data: dict, method: str, tokens: int, sequence: int):
    """The file's `RunConfig` with another method and steps of `tokens` tokens in one micro-batch."""
    length = min(tokens, sequence)
    if tokens % length:
        raise UserError(f"--tokens {tokens}: must be a multiple of --sequence {sequence}, or less")
    data = copy.deepcopy(data)
    data.pop("gradient_accumulation_steps", None)
    data["train_batch_size"] = data["train_micro_batch_size_per_gpu"] = tokens // length
    data["sltrain"]["data"]["sequence_length"] = length
    return variant(path, data, method)


def groups(path, runs: dict, device) -> list[list[str]]:
    """Groups of methods whose engines are resident together: all, or one per group if memory is short. A method that
    does not fit at all is skipped with a line on stderr.
    """
    free, needs = ROOM * free_bytes(device), {}
    for method, sizes in runs.items():
        found = [estimate(run).peak for run in sizes]
        if max(found) > free:
            need = max(found) / 1e9
            print(f"{path}: {method} needs {need:.1f} GB of {free / 1e9:.1f}: left out", file=sys.stderr)
        else:
            needs[method] = min(found), max(found) - min(found)
    # engines step one at a time, so memory that grows with the tokens counts once
    together = sum(held for held, _ in needs.values()) + max((more for _, more in needs.values()), default=0)
    return [list(needs)] if needs and together <= free else [[method] for method in needs]


def _measure(runs: dict, device, rounds: int, seconds: float, report: Report) -> None:
    engines = {}
    for method, sizes in runs.items():
        engines[method] = engine = Engine(method, sizes[0], device)
        if len(engines) > 1:
            continue
        for run in sizes if len(runs) == 1 else sizes[:1]:
            engine.at(run)
            facts = engine.bytes_of_a_step()
            _add(report, interleave({method: engine.step}, rounds, seconds, device, 2, 0.0), {method: engine}, facts)
    for i in range(len(sizes) if len(engines) > 1 else 0):
        for method, engine in engines.items():
            engine.at(runs[method][i])
        steps = {method: engine.step for method, engine in engines.items()}
        _add(report, interleave(steps, rounds, seconds, device, 2, 0.0), engines)
    for engine in engines.values():
        engine.close()


def _add(report: Report, times: dict, engines: dict, facts: dict | None = None) -> None:
    """Add the cases and rows of one size."""
    for method, engine in engines.items():
        case = {
            "method": method, "beside": [other for other in engines if other != method], "times": times[method],
            "full_rank_times": times.get("full_rank"), **engine.facts(), "bytes": facts, **engine.close_look(),
        }  # fmt: skip
        report.add(case, [table_row(case)])


def table_row(case: dict) -> list:
    """Cells of one case: the median time and values derived from it; bytes only if the engine was alone."""
    median, dense, sizes = statistics.median(case["times"]), case["full_rank_times"], case["bytes"] or {}
    most, busy = case["device_flops"], case["busy_ms"]
    return [
        case["method"], case["tokens"], ", ".join(case["beside"]) or "alone", 1e3 * median, case["tokens"] / median,
        most and case["model_flops"] / median / most, dense and ratio(case["times"], dense), case["own_flops"] / 1e12,
        *(megabytes(sizes.get(key)) for key in ("allocated", "active", "reserved", "device")),
        *(case[key] for key in ("launches", "waits", "kernels", "kernels_ms")), busy and busy / (1e3 * median),
    ]  # fmt: skip


class Engine:
    """A method's engine and its batches; `step()` is one optimizer step as the training loop does it."""

    def __init__(self, method: str, run, device):
        self.method, self.device, self.done = method, torch.device(device), 0
        workspace.release()
        began = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            self.engine, self.meter, _ = make_engine(run, device)
        self.built = time.perf_counter() - began
        self.run = run
        stepper, self.last = Stepper(self.engine, run, RandomTokens(run), self.meter), None
        for _ in range(2):  # allocates the optimizer states; measured by the meter
            self._step(stepper)
            self.met = self.meter.read()
        self.stepper = Stepper(self.engine, run, RandomTokens(run))

    def at(self, run) -> None:
        """Switch to steps of `run`'s size and choose the modes for it."""
        if run is self.run:
            return
        self.run, self.stepper = run, Stepper(self.engine, run, RandomTokens(run))
        modes.set_op_mode(self.engine.module, "auto")
        with contextlib.redirect_stdout(sys.stderr):
            agree_on_modes(self.engine.module, run, self.device)

    def step(self) -> None:
        self._step(self.stepper)

    def _step(self, stepper) -> None:
        before, self.last = self.last, stepper.step(self.done)
        _ = before and before.loss  # one step late, as the loop reads it
        self.done += 1

    def facts(self) -> dict:
        """Sizes and FLOPs of a step, and the meter's results of the first two steps."""
        run, model = self.run, self.engine.module
        sizes = (run.model_fields, run.sequence_length, run.tokens_per_step)
        cuda = self.device.type == "cuda"
        return {
            "config": str(run.path or ""), "tokens": run.tokens_per_step, "sequence": run.sequence_length,
            "modes": dict(Counter(modes.chosen(model).values())), "built_s": self.built,
            "model_flops": flops.model_flops(*sizes), "own_flops": flops.step_flops(modes.layers(model), *sizes),
            "device_flops": flops.peak(torch.cuda.get_device_name(self.device)) if cuda else None,
            "estimate": estimate(run).peak, "meter": self.met, "moments": self.meter.peaks,
        }  # fmt: skip

    def bytes_of_a_step(self) -> dict[str, int]:
        """Peaks of one step. CUDA: torch's allocated, active (including blocks in use by other streams) and reserved
        bytes; also the holes in its segments after the step and the used memory of the whole device. CPU: peaks of
        tensors and of the process.
        """
        if self.device.type == "cpu":
            gauge = Gauge(self.device)
            before = gauge.now()
            gauge.most(reset=True)
            self.step()
            return {"allocated": gauge.most(), "device": resident()[1], "before": before}
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        torch.cuda.synchronize(self.device)
        found, (free, total) = torch.cuda.memory_stats(self.device), torch.cuda.mem_get_info(self.device)
        peaks = {key: found[f"{key}_bytes.all.peak"] for key in ("allocated", "active", "reserved")}
        return {**peaks, "holes": found["inactive_split_bytes.all.current"], "device": total - free}

    def close_look(self) -> dict:
        """Profile one step."""
        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as looked:
            self.step()
            if cuda:
                torch.cuda.synchronize(self.device)
        return summary(looked.profiler.kineto_results.events(), cuda)

    def close(self) -> None:
        self.engine.destroy()
        self.engine = self.stepper = self.last = self.meter = None
        workspace.release()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def summary(events, cuda: bool) -> dict:
    """Summary of the profiler's events of a step.

    CUDA: `launches` and `waits` count CPU-side calls, `kernels` the kernels and copies run by the device. `kernels_ms`
    is the sum of their times, `busy_ms` the time during which at least one ran, `top` those with the most time, with ms
    and count. CPU: `kernels` counts PyTorch's and our operators, nested ones too.
    """
    calls, names, spans = Counter(), defaultdict(lambda: [0.0, 0]), []
    for event in events:
        name, on_device = event.name(), event.device_type() == torch.autograd.DeviceType.CUDA
        if on_device and event.is_user_annotation():  # a named range that spans kernels
            continue
        if cuda and not on_device:
            calls[name] += name.startswith("cu")
        elif on_device or name.startswith(("aten::", "sltrain::")):
            begin, length = event.start_ns(), event.duration_ns()
            spans.append((begin, begin + length))
            names[name][0] += length / 1e6
            names[name][1] += 1
    top = sorted(names.items(), key=lambda item: -item[1][0])[:TOP]
    total, busy = sum(length for length, _ in names.values()), _covered(spans) / 1e6
    return {
        "launches": sum(n for name, n in calls.items() if "Launch" in name) if cuda else None,
        # minus the final synchronize, which does not belong to the step
        "waits": sum(n for name, n in calls.items() if "Synchronize" in name) - 1 if cuda else None,
        "kernels": len(spans), "kernels_ms": total if cuda else None, "busy_ms": busy if cuda else None,
        "calls": {name: n for name, n in calls.most_common() if n},
        "top": [{"name": name[:120], "ms": round(ms, 3), "count": n} for name, (ms, n) in top],
    }  # fmt: skip


def _covered(spans) -> int:
    """Length of the union of (begin, end) spans."""
    total, reached = 0, 0
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total
