"""The training loop: batches in, steps, evaluations and checkpoints out."""

import math
import time
from contextlib import closing

import torch
from torch import distributed

from sltrain_ds.checkpoint import save as checkpoint
from sltrain_ds.data.dataset import predicted_tokens
from sltrain_ds.ops.keep_step import micro_batches
from sltrain_ds.training.evaluate import evaluate, on_device, with_labels
from sltrain_ds.training.meter import Meter
from sltrain_ds.training.monitor import Metrics, Progress
from sltrain_ds.zero.grad_norm import GradNorm
from sltrain_ds.zero.late_gradients import clear_late_gradients


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient norm stopped being a number; the last checkpoint is from before."""


def train(engine, run, source, validation, meter: Meter, start_step: int = 0, start_tokens: int = 0) -> None:
    """Train from `start_step` to `run.sltrain.steps`.

    `source` is a `BatchSource`; `validation()` yields evaluation batches anew; `meter` watches the engine. A step is
    the run's global batch: `run.accumulation` micro-batches on each rank. The loss of a step is the mean over all its
    predicted tokens.
    """
    with closing(Progress(run.sltrain.steps, start_step, engine.global_rank)) as progress:
        _train(progress, engine, run, source, validation, meter, start_step, start_tokens)


def _train(progress, engine, run, source, validation, meter, start_step, tokens) -> None:
    """`train`, whose bar's line has ended when an error's begins."""
    block, rank, world = run.sltrain, engine.global_rank, run.world_size
    metrics = Metrics(run.run_dir, engine, rank, start_step if start_step else None)
    grad_norm = GradNorm(engine)

    def evaluation(step):
        result = evaluate(engine, validation(), engine.device)
        metrics.log(step, eval_loss=result.loss, eval_perplexity=result.perplexity, eval_tokens=result.tokens)
        progress.say(f"step {step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}")

    if start_step == 0:
        evaluation(0)
    for step in range(start_step, block.steps):
        began = time.perf_counter()
        torch.manual_seed(hash((block.seed, step, rank)))  # dropout, if any: the same after a resume
        lr = max(group["lr"] for group in engine.optimizer.param_groups)
        batches = [with_labels(source.micro_batch(step, i, rank, world)) for i in range(run.accumulation)]
        loss = optimizer_step(engine, batches, grad_norm, meter)
        tokens += run.tokens_per_step
        norm = grad_norm.value()
        seconds = time.perf_counter() - began
        memory = meter.read()
        rate = run.tokens_per_step / seconds
        numbers = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens, "tokens_per_second": rate}
        if meter.reserved is not None:
            numbers["reserved_bytes"] = meter.reserved
        metrics.log(step + 1, **numbers, memory=memory)
        progress.step(loss, rate, memory["peak"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLoss(
                f"step {step + 1}: loss {loss}, gradient norm {norm}; stopped (on_nonfinite: stop). "
                "Lower the lr or set gradient_clipping, then --resume latest"
            )
        last = step + 1 == block.steps
        if last or _due(step + 1, block.eval.every):
            evaluation(step + 1)
        if last or _due(step + 1, block.checkpoint.every):
            checkpoint.save(engine, run, step + 1, tokens)


def optimizer_step(engine, batches, grad_norm: GradNorm, meter: Meter | None = None) -> float:
    """One optimizer step over this rank's micro-batches; returns the mean loss of the global batch's predicted tokens.

    Every token weighs the same, however many each micro-batch predicts (masked documents leave some out): each loss is
    a sum over the mean count of a micro-batch, which DeepSpeed then averages over micro-batches and ranks.
    """
    parts = len(batches) * engine.dp_world_size
    mean_count = _summed(sum(predicted_tokens(batch) for batch in batches), engine) / parts
    total = 0.0
    clear_late_gradients(engine)
    for batch in micro_batches(engine.module, batches):
        meter and meter.enter("backward")
        loss = engine(**on_device(batch, engine.device), num_items_in_batch=mean_count).loss
        engine.backward(loss)
        meter and meter.enter("step")
        grad_norm.before_step()
        engine.step()
        total += loss.detach().double()
    return _summed(float(total), engine) / parts


def _due(step: int, every: int) -> bool:
    return step % every == 0


def _summed(value: float, engine) -> float:
    if engine.dp_world_size == 1:
        return float(value)
    tensor = torch.tensor(value, dtype=torch.float64, device=engine.device)
    distributed.all_reduce(tensor)
    return float(tensor)
