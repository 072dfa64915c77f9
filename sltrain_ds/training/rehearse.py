"""`rehearse`: one device plays one rank of N through the real engine, and its memory is measured, not estimated."""

from sltrain_ds.data.random_tokens import RandomTokens
from sltrain_ds.training import loop
from sltrain_ds.training.engine import make_engine
from sltrain_ds.training.evaluate import evaluate, with_labels
from sltrain_ds.zero.fake_world import join
from sltrain_ds.zero.grad_norm import GradNorm


def rehearse(run, rank: int, device, steps: int = 3) -> dict:
    """Run `steps` optimizer steps of a `RunConfig` as `rank` of `run.world_size`, on random tokens.

    Returns {"bytes": `Meter.read()`, "moments": `Meter.peaks`}, in bytes. The losses mean nothing: nothing is sent to
    the other ranks and nothing comes back. Call it once, in a process of its own.
    """
    join(rank, run.world_size)
    engine, meter, run = make_engine(run, device)
    source, norm = RandomTokens(run), GradNorm(engine)
    # as a run does before its first step: ZeRO-3 gathers ahead by what the passes so far have shown it
    batch = source.micro_batch(0, 0, rank, run.world_size)
    evaluate(engine, [(batch, 1)] * 3, engine.device)
    for step in range(steps):
        batches = [with_labels(source.micro_batch(step, i, rank, run.world_size)) for i in range(run.accumulation)]
        loop.optimizer_step(engine, batches, norm, meter)
        found = meter.read()
    return {"bytes": found, "moments": dict(meter.peaks)}
