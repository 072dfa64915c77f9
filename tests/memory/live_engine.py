"""Prints, for each case on stdin, the bytes a real DeepSpeed engine holds as rank 0 of `world` ranks (a fake group).

Run by test_zero.py as a process of its own: process groups do not come back once taken.
"""

import json
import os
import sys
from types import SimpleNamespace

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29999")


def main():
    world, cases = json.load(sys.stdin)
    os.environ["WORLD_SIZE"] = str(world)
    torch.distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    print("RESULT" + json.dumps([live(deepspeed, case) for case in cases]))


def live(deepspeed, case):
    from transformers import LlamaConfig, LlamaForCausalLM

    from sltrain_ds import methods
    from sltrain_ds.optim import build_optimizer

    torch.manual_seed(0)
    method = SimpleNamespace(**case["method"], lr_scale=SimpleNamespace())
    registered = methods.get(method.name)
    wanted = {k: v for k, v in case["method"].items() if k != "name"}
    model = LlamaForCausalLM(LlamaConfig(**case["model"]))
    model = methods.convert(model, registered.config(**wanted))
    bf16 = case["weights"] != "fp32"
    if bf16:
        model = model.to(torch.bfloat16)
    run = SimpleNamespace(
        deepspeed={"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        sltrain=SimpleNamespace(method=method, precision=SimpleNamespace(states=case["states"], backend="auto")),
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
    forget_other_optimizers()
    optimizer = build_optimizer(model, run)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    ids = torch.arange(16).view(1, 16) % 32
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return measure(engine, optimizer, case["stage"])


def forget_other_optimizers():
    """bitsandbytes keeps overrides by (group, position) in one manager for the whole process."""
    from bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().index2config.clear()


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


if __name__ == "__main__":
    main()
