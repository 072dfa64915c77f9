"""Rank's side of test_equality.py: train 20 steps at every ZeRO stage asked for and write the losses.

    run_stages.py CONFIG.json OUT.json STAGE...
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

from sltrain_ds import models
from sltrain_ds.config import from_dict
from sltrain_ds.data.dataset import BatchSource
from sltrain_ds.evaluate import with_labels
from sltrain_ds.zero.initialize import initialize, partitioner


def losses(config: dict, stage: int) -> list[float]:
    """Global losses of the run's steps, through the same calls as train.py."""
    world = deepspeed.comm.get_world_size()
    config = json.loads(json.dumps(config))
    config["zero_optimization"]["stage"] = stage
    run = from_dict(config, world_size=world)
    source = BatchSource(run)
    engine, *_ = initialize(model=models.build(run, "cpu", partitioner(run)), config=run)
    found = []
    for step in range(run.sltrain.steps):
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(run.accumulation):
            batch = with_labels(source.micro_batch(step, micro, engine.global_rank, world))
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().double()
        torch.distributed.all_reduce(total)
        found.append(float(total) / (run.accumulation * world))
    engine.destroy()
    return found


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    config_path, out, *stages = arguments
    deepspeed.init_distributed()
    result = {stage: losses(json.loads(Path(config_path).read_text()), int(stage)) for stage in stages}
    if deepspeed.comm.get_rank() == 0:
        Path(out).write_text(json.dumps(result))
