"""One optimizer step over this rank's micro-batches: forward, backward, update, and the numbers of the step."""

from dataclasses import dataclass

import torch
from torch import distributed

from sltrain_ds.data.dataset import predicted_tokens
from sltrain_ds.ops.keep_step import micro_batches
from sltrain_ds.training.evaluate import on_device, with_labels
from sltrain_ds.zero.gathers import gather_after_updates
from sltrain_ds.zero.grad_norm import GradNorm
from sltrain_ds.zero.late_gradients import clear_late_gradients


@dataclass(frozen=True)
class StepResult:
    """The numbers of a queued step, on the device; reading one waits until the device has computed it."""

    loss_sum: torch.Tensor | float  # fp64, summed over micro-batches and ranks
    parts: int  # micro-batches x ranks
    norm: torch.Tensor | float

    @property
    def loss(self) -> float:
        """Mean loss of the global batch's predicted tokens, in nats."""
        return float(self.loss_sum) / self.parts

    @property
    def grad_norm(self) -> float:
        """Global gradient norm before clipping."""
        return float(self.norm)


class Stepper:
    """Runs the steps of a `RunConfig` on its engine; `source.micro_batch(step, i, rank, world)` gives the batches.

    `meter` (training/meter.py), if given, is told which part of the step runs.
    """

    def __init__(self, engine, run, source, meter=None):
        self.engine, self.run, self.source, self.meter = engine, run, source, meter
        self._norm = GradNorm(engine)

    def step(self, number: int) -> StepResult:
        """Step `number`, counted from 0, over the run's own batches."""
        run, rank = self.run, self.engine.global_rank
        return self.over([self.source.micro_batch(number, i, rank, run.world_size) for i in range(run.accumulation)])

    def over(self, batches: list[dict]) -> StepResult:
        """A step over given micro-batches, dicts of CPU tensors.

        Every token weighs the same, however many each micro-batch predicts (masked documents leave some out): each
        loss is a sum over the mean count of a micro-batch, which DeepSpeed then averages over micro-batches and ranks.
        """
        engine, meter = self.engine, self.meter
        parts = len(batches) * engine.dp_world_size
        mean_count = self._mean_count(batches, parts)
        total = 0.0
        clear_late_gradients(engine)
        for batch in micro_batches(engine.module, [with_labels(batch) for batch in batches]):
            if meter:
                meter.enter("backward")
            loss = engine(**on_device(batch, engine.device), num_items_in_batch=mean_count).loss
            engine.backward(loss)
            if meter:
                meter.enter("step")
            self._norm.before_step()
            engine.step()
            total += loss.detach().double()
        gather_after_updates(engine)
        if engine.dp_world_size > 1:
            distributed.all_reduce(total)
        return StepResult(total, parts, self._norm.of_last_step())

    def _mean_count(self, batches, parts) -> float:
        """Predicted tokens of a micro-batch, on average over all ranks."""
        count = sum(predicted_tokens(batch) for batch in batches)
        if self.engine.dp_world_size == 1 or not any("labels" in batch for batch in batches):
            return count / len(batches)  # the same on every rank: no collective, and no wait for the device
        summed = torch.tensor(count, dtype=torch.float64, device=self.engine.device)
        distributed.all_reduce(summed)
        return float(summed) / parts
