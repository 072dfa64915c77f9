"""A good config for the tests of this room: 60M by preset, nothing on disk."""

import copy

import pytest

GOOD = {
    "train_batch_size": 512,
    "train_micro_batch_size_per_gpu": 32,
    "gradient_clipping": 0.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 500000},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "betas": [0.9, 0.999], "torch_adam": True}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 11000, "warmup_num_steps": 1100, "warmup_type": "linear", "cos_min_ratio": 0.1},
    },
    "sltrain": {
        "model": {"preset": "llama_60m"},
        "method": {"name": "sltrain", "rank": 128, "density": 0.03, "alpha": 32},
        "precision": {"states": "8bit"},
        "tokenizer": "prepared/tokenizer",
        "data": {"dir": "prepared/data"},
        "steps": 11000,
    },
}


@pytest.fixture
def good():
    return copy.deepcopy(GOOD)
