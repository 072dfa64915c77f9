"""A rank's side of the per-layer tests: each config is trained with and without the per-layer update.

    run_per_layer.py CONFIGS.json OUT.json      CONFIGS: {name: config}, per_layer_update true, clipping off
                                                OUT: {name: {"weights", "states", "norm", "losses"}}

"weights" and "states" are the largest differences of any element on any rank ("states" of the optimizer, whatever its
format), "norm" the largest relative difference of the global gradient norms. The run without is stock DeepSpeed on the
same parameter groups. Keys of a config beyond the file's: "wrong_lr", the negative control, in one group the rate is 1%
off; "same_batches", every rank trains on rank 0's.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import deepspeed
import torch

from sltrain_ds.config import from_dict
from sltrain_ds.data.dataset import BatchSource
from sltrain_ds.logs import quiet
from sltrain_ds.models import build as models
from sltrain_ds.optim.blockwise_adam import BlockwiseAdam
from sltrain_ds.training.stepper import Stepper
from sltrain_ds.zero import initialize as initialize_module
from sltrain_ds.zero.engine_swap import zero_classes
from sltrain_ds.zero.start import leave, start


def train(run, wrong_lr=False, same_batches=False):
    """The engine after the run's steps, its losses and its gradient norms."""
    world, source = deepspeed.comm.get_world_size(), BatchSource(run)
    model = models.build(run, "cpu", initialize_module.partitioner(run))
    engine, *_ = initialize_module.initialize(model=model, config=run)
    for group in engine.basic_optimizer.param_groups:
        # torch's fused Adam rounds the last elements of a tensor, those past its vectors, otherwise than the rest
        group |= {"fused": False} if "fused" in group else {}
    losses, norms, stepper = [], [], Stepper(engine, run, source)
    for step in range(run.sltrain.steps):
        if wrong_lr:
            engine.optimizer.param_groups[1]["lr"] *= 1.01
        rank = 0 if same_batches else engine.global_rank
        result = stepper.over([source.micro_batch(step, i, rank, world) for i in range(run.accumulation)])
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return engine, losses, norms


def weights(engine) -> dict[str, torch.Tensor]:
    parameters = dict(engine.module.named_parameters())
    if not hasattr(next(iter(parameters.values())), "ds_tensor"):
        return {name: p.detach().clone() for name, p in parameters.items()}
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().clone() for name, p in parameters.items()}


def states(engine) -> list[torch.Tensor]:
    """This rank's optimizer states, parameter by parameter, without what belongs to padding."""
    zero, inner, found = engine.optimizer, engine.basic_optimizer, []
    sharded = hasattr(zero, "fp16_groups")
    if sharded:
        zero._set_fp32_optimizer_param_groups()
    for i, group in enumerate(inner.param_groups):
        for p in group["params"]:
            if isinstance(inner, BlockwiseAdam):
                found += [tensor for _, tensors in inner.segment_states(p) for tensor in tensors]
            else:
                spans = [(0, p.numel())] if hasattr(zero, "pieces") else (spans3 if sharded else spans2)(zero, i)
                found += [inner.state[p][key][a:b] for a, b in spans for key in ("exp_avg", "exp_avg_sq")]
    if sharded:
        zero._clear_fp32_optimizer_param_groups()
    return found


def spans2(zero, i):
    """Where a flat partition of stage 2 holds parameters, not padding."""
    size = zero.single_partition_of_fp32_groups[i].numel()
    first = deepspeed.comm.get_rank() * size
    for p, begin in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
        low, high = max(begin, first), min(begin + p.numel(), first + size)
        if low < high:
            yield low - first, high - first


def spans3(zero, i):
    offset = 0
    for p in zero.fp16_groups[i]:
        size = p.partition_numel()
        real = min(size, p.ds_numel - deepspeed.comm.get_rank() * size)
        if real > 0:
            yield offset, offset + real
        offset += size


def difference(a, b) -> float:
    assert len(a) == len(b) > 0
    return max(float((x.float() - y.float()).abs().max()) for x, y in zip(a, b, strict=True))


def compare(config) -> dict:
    wrong, same = (config.pop(key, False) for key in ("wrong_lr", "same_batches"))
    run = from_dict(config, world_size=deepspeed.comm.get_world_size())
    ours, losses, norms = train(run, wrong, same)
    mine = list(weights(ours).values()), states(ours)
    ours.destroy()
    with mock.patch.object(initialize_module, "zero_classes", lambda aligned, _: zero_classes(aligned, None)):
        stock, _, expected = train(run, same_batches=same)
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
    deepspeed.comm.barrier()
    leave()
