"""Prints, for each case on stdin, the bytes a real DeepSpeed engine holds as rank 0 of `world` ranks (a fake group).

Run by test_zero.py and test_peak.py as a process of its own: process groups do not come back once taken. With "peak"
the case is a whole config, and the bytes are the most that lived at once in each of the estimate's moments.
"""

import gc
import json
import os
import sys
import weakref
from types import SimpleNamespace

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29999")


def main():
    world, cases = json.load(sys.stdin)
    os.environ["WORLD_SIZE"] = str(world)
    torch.distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    import deepspeed

    # nothing is sent, so the shared-memory collectives, a minute's compilation, are not needed
    deepspeed.comm.torch.build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    print("RESULT" + json.dumps([(peaks if "peak" in case else live)(deepspeed, case) for case in cases]))


def live(deepspeed, case):
    from transformers import LlamaConfig, LlamaForCausalLM

    from sltrain_ds.methods.convert import convert
    from sltrain_ds.methods.registry import get
    from sltrain_ds.optim.build import build_optimizer
    from sltrain_ds.zero.aligned import partition_aligned
    from sltrain_ds.zero.engine_swap import zero_classes

    torch.manual_seed(0)
    method = SimpleNamespace(**case["method"], lr_scale=SimpleNamespace())
    wanted = {k: v for k, v in case["method"].items() if k != "name"}
    model = LlamaForCausalLM(LlamaConfig(**case["model"]))
    model = convert(model, get(method.name)(**wanted))
    bf16 = case["weights"] != "fp32"
    if bf16:
        model = model.to(torch.bfloat16)
    run = SimpleNamespace(
        deepspeed={"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        sltrain=SimpleNamespace(
            method=method,
            seed=0,
            precision=SimpleNamespace(states=case["states"], backend=case["backend"], weights=case["weights"]),
        ),
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case["stage"], "reduce_bucket_size": 20000, **case.get("zero", {})},
        "bf16": {"enabled": bf16},
    }
    if case["weights"] == "bf16":
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    optimizer = build_optimizer(model, run)
    ours = case["backend"] == "ours"
    if ours and case["stage"] == 3:
        partition_aligned(model, config, torch.bfloat16 if bf16 else torch.float32)
    with zero_classes(aligned=ours, clipping=None):
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    ids = torch.arange(16).view(1, 16) % 32
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return measure(engine, optimizer, case["stage"])


def size(tensors):
    """Bytes of the storages, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(found.values())


def measure(engine, optimizer, stage):
    zero = engine.optimizer
    weights = list(engine.module.parameters())
    masters = []
    if stage in (1, 2):
        masters = zero.single_partition_of_fp32_groups
    if stage == 3:
        weights += [p.ds_tensor for p in weights]
        masters = zero.fp32_partitioned_groups_flat
    states = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and key != "step" and not key.startswith("qmap")
    ]
    index = [b for n, b in engine.module.named_buffers() if n.endswith(("S_rows", "S_columns"))]
    return {"weights": size(weights), "masters": size(masters), "states": size(states), "index": size(index)}


class Live(TorchDispatchMode):
    """Bytes of the storages alive, now and at most since `begin`."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._drop, key)
        return out

    def _drop(self, key):
        self.now -= self.sizes.pop(key, 0)

    def begin(self):
        gc.collect()
        self.most = self.now


def peaks(deepspeed, case):
    from sltrain_ds.config import from_dict
    from sltrain_ds.models import build as models
    from sltrain_ds.models.chunked_loss import use_chunked_loss
    from sltrain_ds.ops import workspace
    from sltrain_ds.zero.initialize import initialize, partitioner

    workspace.release()
    gc.collect()
    run = from_dict(case["peak"], world_size=torch.distributed.get_world_size())
    found = dict.fromkeys(("initialize", "backward", "step"), 0)
    with Live() as live:
        model = models.build(run, "cpu", partitioner(run))
        if run.sltrain.loss == "chunked":
            use_chunked_loss(model)
        engine, *_ = initialize(model=model, config=run)
        found["initialize"] = live.most
        ids = torch.randint(0, 100, (run.micro_batch_size, run.sequence_length))
        for _ in range(2 * run.accumulation):  # the states come into being in the first step
            live.begin()
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            found["backward"] = max(found["backward"], live.most)
            live.begin()
            engine.step()
            found["step"] = max(found["step"], live.most)
    return found


if __name__ == "__main__":
    main()
