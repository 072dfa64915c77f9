"""A rank's side of the per-layer tests: each config is trained with and without the per-layer update.

    run_per_layer.py CONFIGS.json OUT.json      CONFIGS: {name: config}, per_layer_update true, clipping off
                                                OUT: {name: {"weights", "states", "norm", "losses"}}

"weights" and "states" are the largest differences of any element on any rank ("states" of the optimizer, whatever its
format), "norm" the largest relative difference of the global gradient norms. The run without is stock DeepSpeed on the
same parameter groups. A config with the key "wrong_lr" is the negative control: in one group the rate is 1% off.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import deepspeed
import torch

from sltrain_ds import models
from sltrain_ds.config import from_dict
from sltrain_ds.data.dataset import BatchSource
from sltrain_ds.evaluate import with_labels
from sltrain_ds.logs import quiet
from sltrain_ds.loop import optimizer_step
from sltrain_ds.zero import initialize as initialize_module
from sltrain_ds.zero.grad_norm import GradNorm
from sltrain_ds.zero.start import start


def train(run, wrong_lr=False):
    """The engine after the run's steps, its losses and its gradient norms."""
    world, source = deepspeed.comm.get_world_size(), BatchSource(run)
    model = models.build(run, "cpu", initialize_module.partitioner(run))
    engine, *_ = initialize_module.initialize(model=model, config=run)
    for group in engine.basic_optimizer.param_groups:
        # torch's fused Adam rounds the last elements of a tensor, those past its vectors, otherwise than the rest
        group |= {"fused": False} if "fused" in group else {}
    losses, norms, grad_norm = [], [], GradNorm(engine)
    for step in range(run.sltrain.steps):
        if wrong_lr:
            engine.optimizer.param_groups[1]["lr"] *= 1.01
        batches = [with_labels(source.micro_batch(step, i, engine.global_rank, world)) for i in range(run.accumulation)]
        losses.append(optimizer_step(engine, batches, grad_norm))
        norms.append(grad_norm.value())
    return engine, losses, norms


def weights(engine) -> dict[str, torch.Tensor]:
    parameters = dict(engine.module.named_parameters())
    if not hasattr(next(iter(parameters.values())), "ds_tensor"):
        return {name: p.detach().clone() for name, p in parameters.items()}
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().clone() for name, p in parameters.items()}


def states(engine) -> list[torch.Tensor]:
    """This rank's states, one tensor a group and key, without what belongs to padding."""
    zero, inner = engine.optimizer, engine.basic_optimizer
    found = []
    for i, group in enumerate(inner.param_groups):
        if hasattr(zero, "segments"):
            pieces = [(inner.state[segment.master], 0, segment.master.numel()) for segment in zero.segments[i]]
        elif hasattr(zero, "fp16_groups"):
            flat, offset, pieces = zero.fp32_partitioned_groups_flat[i], 0, []
            for p in zero.fp16_groups[i]:
                size = p.partition_numel()
                real = min(size, p.ds_numel - deepspeed.comm.get_rank() * size)
                if real > 0:
                    pieces.append((inner.state[flat], offset, offset + real))
                offset += size
        else:
            (flat,) = group["params"]
            size = flat.numel()
            first = deepspeed.comm.get_rank() * size
            pieces = []
            for p, begin in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
                low, high = max(begin, first), min(begin + p.numel(), first + size)
                if low < high:
                    pieces.append((inner.state[flat], low - first, high - first))
        for state, low, high in pieces:
            found += [
                v.reshape(-1)[low:high].float() for k, v in sorted(state.items()) if k in ("exp_avg", "exp_avg_sq")
            ]
    return found


def difference(a, b) -> float:
    assert len(a) == len(b) > 0
    return max(float((x.float() - y.float()).abs().max()) for x, y in zip(a, b, strict=True))


def compare(config) -> dict:
    wrong = config.pop("wrong_lr", False)
    run = from_dict(config, world_size=deepspeed.comm.get_world_size())
    ours, losses, norms = train(run, wrong)
    mine = list(weights(ours).values()), states(ours)
    ours.destroy()
    with mock.patch.object(initialize_module, "per_layer_engine", lambda clipping: nullcontext()):
        stock, _, expected = train(run)
    theirs = list(weights(stock).values()), states(stock)
    assert type(stock.optimizer) is not type(ours.optimizer)
    stock.destroy()
    found = [difference(a, b) for a, b in zip(mine, theirs, strict=True)]
    found.append(max(abs(a - b) / b for a, b in zip(norms, expected, strict=True)))
    worst = torch.tensor(found)
    deepspeed.comm.all_reduce(worst, op=deepspeed.comm.ReduceOp.MAX)
    return dict(zip(("weights", "states", "norm"), worst.tolist(), strict=True)) | {"losses": losses}


if __name__ == "__main__":
    quiet()
    config_path, out = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    start()
    result = {}
    for name, config in json.loads(Path(config_path).read_text()).items():
        try:
            result[name] = compare(config)
        except Exception as error:
            error.add_note(f"in the variant {name}")
            raise
    if deepspeed.comm.get_rank() == 0:
        Path(out).write_text(json.dumps(result))
