"""A rank's side of test_per_layer_memory.py: trains each config for a few steps and counts bytes.

    per_layer_memory_worker.py CONFIGS.json OUT.json        OUT: {name: {"init", "gradients", "unit"}}

"init" is the peak while the engine is made over the bytes of the weights this rank holds, "gradients" the peak in
backward above what was alive before it, in gradient elements, and "unit" the elements of the largest unit. Of all ranks
the largest. Of the steps after the first, which makes the states, the least: gloo's threads may let go of a bucket a
moment late.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from live_bytes import LiveBytes

from sltrain_ds.config import from_dict
from sltrain_ds.models import build as models
from sltrain_ds.zero.initialize import initialize, partitioner
from sltrain_ds.zero.per_layer import clipping
from sltrain_ds.zero.start import leave, start


def held(model) -> list[torch.Tensor]:
    return [getattr(p, "ds_tensor", p.data) for p in model.parameters()]


def measure(config) -> dict:
    run = from_dict(config, world_size=deepspeed.comm.get_world_size())
    model = models.build(run, "cpu", partitioner(run))
    weights = sum(tensor.nbytes for tensor in held(model))
    with LiveBytes(*held(model)) as memory:
        engine, *_ = initialize(model=model, config=run)
        made = memory.peak
        tokens = torch.arange(run.micro_batch_size * 2).view(-1, 2)
        peaks = []
        for _ in range(5):
            loss = engine(input_ids=tokens, labels=tokens).loss
            before = memory.mark()
            engine.backward(loss)
            peaks.append((memory.peak - before) / next(model.parameters()).element_size())
            engine.step()
    zero = engine.optimizer
    numel = {p: getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
    units = [sum(numel[p] for i in unit.groups for p in zero.groups[i]) for unit in zero.units]
    found = torch.tensor([made / weights, min(peaks[1:]), max(units)], dtype=torch.float64)
    deepspeed.comm.all_reduce(found, op=deepspeed.comm.ReduceOp.MAX)
    engine.destroy()
    return dict(zip(("init", "gradients", "unit"), found.tolist(), strict=True))


if __name__ == "__main__":
    config_path, out = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    clipping.CHUNK = 1024  # elements that a norm on CPUs casts at a time: small beside these units too
    start()
    result = {name: measure(config) for name, config in json.loads(Path(config_path).read_text()).items()}
    if deepspeed.comm.get_rank() == 0:
        Path(out).write_text(json.dumps(result))
    deepspeed.comm.barrier()
    leave()
