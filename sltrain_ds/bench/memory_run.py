"""Process of one row of `bench memory`: `python -m sltrain_ds.bench.memory_run JOB.json`.

The job is {"config", "name", "steps", "device", "naive"}; the last line of stdout is the result.
"""

import contextlib
import json
import sys
import time
from pathlib import Path


def main(path: str) -> int:
    from sltrain_ds.config import from_dict
    from sltrain_ds.logs import quiet
    from sltrain_ds.memory.malloc import give_back_large_blocks
    from sltrain_ds.zero.start import start

    quiet()
    give_back_large_blocks()  # in every row, so that rows differ only by their config
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(sys.stderr):
        start()
        found = measure(from_dict(job["config"], name=job["name"]), job)
    print(json.dumps(found))
    return 0


def measure(run, job: dict) -> dict:
    """Run `steps` optimizer steps like training; returns bytes, moments, losses, and seconds of the last step."""
    from sltrain_ds.bench.naive import to_naive
    from sltrain_ds.data.dataset import BatchSource
    from sltrain_ds.data.random_tokens import RandomTokens
    from sltrain_ds.errors import UserError
    from sltrain_ds.training.engine import make_engine
    from sltrain_ds.training.stepper import Stepper

    try:
        source, tokens = BatchSource(run), "real"
    except UserError as error:
        print(f"no prepared data ({error}): using random tokens", file=sys.stderr)
        source, tokens = RandomTokens(run), "random"
    engine, meter, run = make_engine(run, job["device"])
    if job["naive"]:
        to_naive(engine.module)
    stepper, losses = Stepper(engine, run, source, meter), []
    for step in range(job["steps"]):
        began = time.perf_counter()
        losses.append(stepper.step(step).loss)
        seconds = time.perf_counter() - began
        found = meter.read()
    return {"bytes": found, "moments": meter.peaks, "losses": losses, "seconds": seconds, "tokens": tokens}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
