"""`rehearse`: one device plays one rank of N through the real engine, and its memory is measured, not estimated."""

from sltrain_ds.data.random_tokens import RandomTokens
from sltrain_ds.training.engine import make_engine
from sltrain_ds.training.evaluate import evaluate
from sltrain_ds.training.stepper import Stepper
from sltrain_ds.zero.fake_world import join


def rehearse(run, rank: int, device, steps: int = 3) -> dict:
    """Run `steps` optimizer steps of a `RunConfig` as `rank` of `run.world_size`, on random tokens.

    Returns {"bytes": `Meter.read()`, "moments": `Meter.peaks`}, in bytes. The losses mean nothing: nothing is sent to
    the other ranks and nothing comes back. Call it once, in a process of its own.
    """
    join(rank, run.world_size)
    engine, meter, run = make_engine(run, device)
    source = RandomTokens(run)
    stepper = Stepper(engine, run, source, meter)
    # as a run does before its first step: ZeRO-3 gathers ahead by what the passes so far have shown it
    batch = source.micro_batch(0, 0, rank, run.world_size)
    evaluate(engine, [(batch, 1)] * 3, engine.device)
    for step in range(steps):
        stepper.step(step)
        found = meter.read()
    return {"bytes": found, "moments": dict(meter.peaks)}
