"""Tiny run directories as the training loop leaves them."""

import json
import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sltrain_ds.methods.convert import convert
from sltrain_ds.methods.registry import get

MODEL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
METHODS = {
    "sltrain": {"name": "sltrain", "rank": 4, "density": 0.1, "alpha": 8.0, "target_modules": ["self_attn", "mlp"]},
    "low_rank": {"name": "low_rank", "rank": 4, "alpha": 8.0, "target_modules": ["self_attn", "mlp"]},
    "full_rank": {"name": "full_rank"},
}


def config(method="sltrain"):
    return {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "sltrain": {
            "model": {"config": MODEL},
            "method": METHODS[method],
            "tokenizer": "tokenizer",
            "data": {"dir": "data", "sequence_length": 16},
            "steps": 60,
        },
    }


def line(step):
    memory = {"weights": 40_000, "index": 900, "states": 80_000, "masters": 20_000, "peak": 400_000_000}
    return {
        "step": step,
        "loss": 2 + 2 * math.exp(-step / 20),
        "lr": 1e-3 * min(1, step / 6),
        "grad_norm": 1 + 1 / step,
        "tokens": 128 * step,
        "tokens_per_second": 1000.0,
        "memory": memory,
    }


def model(method="sltrain", seed=0):
    torch.manual_seed(seed)
    block = {key: value for key, value in METHODS[method].items() if key != "name"}
    built = convert(LlamaForCausalLM(LlamaConfig(**MODEL)), get(method)(**block))
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.05)
    return built


def save_checkpoint(folder, built, method="sltrain", world_size=2):
    """What the loop leaves at stages 0 to 2, weights alone."""
    step = folder / "checkpoints" / "step_00000060"
    step.mkdir(parents=True)
    buffers = [name for name, _ in built.named_buffers() if name in built.state_dict()]
    torch.save({"module": built.state_dict(), "buffer_names": buffers}, step / "mp_rank_00_model_states.pt")
    supports = {m.layer_name: m.support_info() for m in built.modules() if hasattr(m, "support_info")}
    state = {"format": 1, "config": config(method), "step": 60, "tokens": 7680, "zero_stage": 2,
             "world_size": world_size, "supports": supports}  # fmt: skip
    (step / "sltrain.json").write_text(json.dumps(state))
    (folder / "checkpoints" / "latest").write_text(step.name)
