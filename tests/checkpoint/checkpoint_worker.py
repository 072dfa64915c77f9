"""Trains a small odd-sized model for three steps and saves it as the training loop does; run by the launcher.

    deepspeed --num_gpus N checkpoint_worker.py OUT_DIR CASE...     CASE is STAGE-PRECISION-OPTIMIZER: 2-bf16-adam8bit

Per case it leaves OUT_DIR/CASE/step_00000003/ and OUT_DIR/CASE/expected.safetensors, the engine's own weights.
A case passes only if a second engine also resumes from the checkpoint through `safe_checkpoint_engine`.
"""

import gc
import json
import sys
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file
from torch import nn

from sltrain_ds.checkpoint.safe_load import safe_checkpoint_engine
from sltrain_ds.optim.blockwise_adam import BlockwiseAdam
from sltrain_ds.zero.aligned import partition_aligned
from sltrain_ds.zero.engine_swap import zero_classes
from sltrain_ds.zero.start import leave

TAG = "step_00000003"


class Layer(nn.Module):
    """The tensors of an SLTrain layer: two factors, sparse values, a support in uint16."""

    def __init__(self, width_in, width_out, rank, nnz):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, width_in))
        self.B = nn.Parameter(torch.randn(width_out, rank))
        self.S_values = nn.Parameter(torch.randn(nnz))
        self.register_buffer("S_columns", torch.arange(nnz, dtype=torch.int32).to(torch.uint16))
        self.register_buffer("workspace", torch.zeros(3), persistent=False)

    def forward(self, x):
        return x @ self.A.T @ self.B.T + self.S_values.sum()


class Toy(nn.Module):
    """Odd sizes everywhere; a tied head, a frozen parameter and one of `last_nnz` values."""

    def __init__(self, last_nnz):
        super().__init__()
        self.embed = nn.Embedding(23, 13)
        self.first = Layer(13, 19, 3, 37)
        self.second = Layer(19, 13, 5, last_nnz)
        self.norm = nn.LayerNorm(13, bias=False)
        self.shift = nn.Parameter(torch.randn(13), requires_grad=False)
        self.head = nn.Linear(13, 23, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.norm(self.second(self.first(self.embed(tokens)))) + self.shift
        return nn.functional.cross_entropy(self.head(x).flatten(0, -2).float(), tokens.flatten())


def start(stage, precision, kind):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 20, "reduce_bucket_size": 1000, "sub_group_size": 300}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_num_steps": 2}},
    }
    if precision != "fp32":
        config["bf16"] = {"enabled": True}
    if precision == "bf16all":
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    torch.manual_seed(0)
    model = Toy(last_nnz=0 if stage < 3 else 1)  # stage 3 of DeepSpeed 0.19.8 cannot gather an empty parameter
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1, "lr": 3e-3},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    if kind == "adam8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(groups, lr=1e-2, min_8bit_size=256)
    elif kind == "blockwise":
        groups[1]["name"] = "norms"
        names = {parameter: name for name, parameter in model.named_parameters()}
        optimizer = BlockwiseAdam(groups, lr=1e-2, names=names, stochastic=precision == "bf16all")
        if stage == 3:
            partition_aligned(model, config, torch.float32 if precision == "fp32" else torch.bfloat16)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    with zero_classes(aligned=kind == "blockwise", clipping=None):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(engine, steps):
    for step in range(steps):
        torch.manual_seed(step * 10 + engine.global_rank)
        loss = engine(torch.randint(0, 23, (2, 7)))
        engine.backward(loss)
        engine.step()


def weights(engine):
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    for name, buffer in engine.module.named_buffers():
        found[name] = buffer.clone()
    return found


def write_state(engine, folder, stage):
    """What the training loop adds to a DeepSpeed checkpoint; without it the checkpoint counts as incomplete."""
    state = {"format": 1, "config": {"sltrain": {}}, "step": 3, "tokens": 42, "zero_stage": stage}
    state |= {"world_size": engine.world_size, "supports": {}}
    (folder / TAG / "sltrain.json").write_text(json.dumps(state))


def run(out, case):
    stage, precision, kind = case.split("-")
    folder = Path(out) / case
    engine = start(int(stage), precision, kind)
    train(engine, 3)
    engine.save_checkpoint(str(folder), tag=TAG, client_state={"step": 3, "tokens": 42})
    expected = weights(engine)
    if engine.global_rank == 0:
        save_file(expected, folder / "expected.safetensors")
        write_state(engine, folder, int(stage))
    train(engine, 1)
    after = weights(engine)
    engine.destroy()

    engine = start(int(stage), precision, kind)
    with safe_checkpoint_engine(engine):
        _, client = engine.load_checkpoint(str(folder), tag=TAG)
    assert client["tokens"] == 42, client.keys()
    train(engine, 1)
    for name, value in weights(engine).items():
        assert torch.equal(value, after[name]), f"{case}: {name} differs after resuming"
    engine.destroy()
    gc.collect()


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    deepspeed.init_distributed()
    for case in arguments[1:]:
        run(arguments[0], case)
    leave()
