"""The training loop: batches in, steps and what the callbacks make of them out."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from sltrain_ds.checkpoint.save import save
from sltrain_ds.training.callbacks import Callback, name_of
from sltrain_ds.training.evaluate import Evaluation, evaluate
from sltrain_ds.training.meter import Meter
from sltrain_ds.training.monitor import Metrics, Progress
from sltrain_ds.training.stepper import Stepper, StepResult


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient norm stopped being a number; the last checkpoint is from before."""


class NonFiniteStop(Callback):
    """Ends the run at a loss or a gradient norm that is not finite."""

    def step_end(self, training, step, numbers):
        loss, norm = numbers["loss"], numbers["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLoss(
                f"step {step}: loss {loss}, gradient norm {norm}; stopped (on_nonfinite: stop). "
                "Lower the lr or set gradient_clipping, then --resume latest"
            )


class Every(Callback):
    """Calls `action(training)` after every `steps` steps and after the last one."""

    def __init__(self, steps: int, last: int, action: Callable[["Training"], Any]):
        self.steps, self.last, self.action = steps, last, action

    def due(self, step):
        return step == self.last or step % self.steps == 0

    def step_end(self, training, step, numbers):
        if self.due(step):
            self.action(training)


class Training:
    """A run under way: what the callbacks see.

    `source` is a `BatchSource`; `validation()` yields evaluation batches anew; `meter` watches the engine. A step is
    the run's global batch: `run.accumulation` micro-batches on each rank. The loss of a step is the mean over all its
    predicted tokens. `own` are the user's callbacks.
    """

    def __init__(self, engine, run, source, validation, meter: Meter, step=0, tokens=0, own=()):
        self.engine, self.run, self.validation, self.meter = engine, run, validation, meter
        self.step, self.tokens, self.start_step = step, tokens, step
        self.rank, block = engine.global_rank, run.sltrain
        self.stepper = Stepper(engine, run, source, meter)
        self.progress = Progress(block.steps, step, self.rank)
        self.own = list(own)
        self.callbacks = [
            Metrics(run.run_dir, engine, self.rank, step if step else None),
            self.progress,
            NonFiniteStop(),
            *self.own,  # before the checkpoint of their step, which keeps their states
            Every(block.eval.every, block.steps, Training.evaluate),
            Every(block.checkpoint.every, block.steps, Training.save),
        ]

    def train(self) -> None:
        """Train up to `run.sltrain.steps`."""
        try:
            self._train()
        finally:
            self.progress.close()  # so that an error begins a line of its own

    def _train(self) -> None:
        for callback in self.callbacks:
            callback.start(self)
        if self.start_step == 0:
            self.evaluate()
        queued = None
        for number in range(self.start_step, self.run.sltrain.steps):
            finished, queued = queued, self._queue(number)
            if finished:
                self._step_end(finished)
            self.step = number + 1
            if self.step == self.run.sltrain.steps or any(callback.due(self.step) for callback in self.callbacks):
                self._step_end(queued)
                queued = None
        for callback in self.callbacks:
            callback.end(self)

    def _queue(self, number: int) -> "_Queued":
        """Give the device the work of a step; on a GPU nothing here waits for it."""
        began = _now(self.engine.device)
        torch.manual_seed(hash((self.run.sltrain.seed, number, self.rank)))  # dropout: the same after a resume
        lr = max(group["lr"] for group in self.engine.optimizer.param_groups)
        result = self.stepper.step(number)
        self.tokens += self.run.tokens_per_step
        ended = _now(self.engine.device)
        memory, reserved = self.meter.read(), self.meter.reserved
        return _Queued(number + 1, result, lr, self.tokens, began, ended, memory, reserved)

    def _step_end(self, queued: "_Queued") -> None:
        numbers = queued.numbers(self.run.tokens_per_step)
        for callback in self.callbacks:
            callback.step_end(self, queued.step, numbers)

    def say(self, text: str) -> None:
        """A line above the progress bar, from rank 0."""
        self.progress.say(text)

    def evaluate(self) -> Evaluation:
        """The validation loss now, which every callback gets to see."""
        result = evaluate(self.engine, self.validation(), self.engine.device)
        for callback in self.callbacks:
            callback.evaluated(self, self.step, result)
        return result

    def save(self) -> None:
        """Write a checkpoint now, the callbacks' states included."""
        for callback in self.callbacks:
            callback.saving(self, self.step)
        states = {name_of(callback): callback.state_dict() for callback in self.own}
        save(self.engine, self.run, self.step, self.tokens, states)


class _Queued:
    """A step that the device has been given: `numbers` waits for it."""

    def __init__(self, step, result: StepResult, lr, tokens, began, ended, memory, reserved):
        self.step, self.result, self.lr, self.tokens = step, result, lr, tokens
        self.began, self.ended, self.memory, self.reserved = began, ended, memory, reserved

    def numbers(self, tokens_per_step: int) -> dict[str, Any]:
        found = {"loss": self.result.loss, "lr": self.lr, "grad_norm": self.result.grad_norm, "tokens": self.tokens,
                 "tokens_per_second": tokens_per_step / _seconds(self.began, self.ended)}  # fmt: skip
        if self.reserved is not None:
            found["reserved_bytes"] = self.reserved
        return {**found, "memory": self.memory}


def _now(device):
    """A moment, in the device's own order of work."""
    if torch.device(device).type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(began, ended) -> float:
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1e3
