"""A rank's side of test_per_layer_memory.py: trains each config for two steps and counts bytes.

    per_layer_memory_worker.py CONFIGS.json OUT.json        OUT: {name: {"init", "gradients", "unit"}}

"init" is the peak while the engine is made over the bytes of the weights this rank holds, "gradients" the peak in the
second step's backward above what was alive before it, in gradient elements, and "unit" the elements of the largest
unit. Of all ranks the largest.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from live_bytes import LiveBytes

from sltrain_ds import models
from sltrain_ds.config import from_dict
from sltrain_ds.zero import clipping
from sltrain_ds.zero.initialize import initialize, partitioner
from sltrain_ds.zero.start import start


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
        for _ in range(2):
            for _ in range(run.accumulation):
                loss = engine(input_ids=tokens, labels=tokens).loss
                before = memory.mark()
                engine.backward(loss)
                engine.step()
    elements = (memory.peak - before) / next(model.parameters()).element_size()
    units = [
        sum(
            p.ds_numel if hasattr(p, "ds_numel") else p.numel() for i in unit.groups for p in engine.optimizer.groups[i]
        )
        for unit in engine.optimizer.units
    ]
    found = torch.tensor([made / weights, elements, max(units)], dtype=torch.float64)
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
    torch.distributed.destroy_process_group()
