"""The estimate's moments against the most bytes of tensors that lived at once in a real engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sltrain_ds.config import from_dict
from sltrain_ds.memory.estimate import estimate

MODEL = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
CASES = [
    {"stage": 1},
    {"stage": 2},
    {"stage": 2, "accumulation": 3},
    {"stage": 2, "weights": "fp32", "method": {"name": "full_rank"}},
    {"stage": 2, "length": 256, "loss": "chunked", "checkpointing": "non_reentrant"},
    {"stage": 2, "length": 256, "method": {"name": "low_rank", "rank": 32, "alpha": 8}},
    {"stage": 3, "weights": "bf16"},
    # what is let go after use, as large parameters are
    {"stage": 3, "weights": "bf16", "per_layer": True, "zero": {"stage3_param_persistence_threshold": 0}},
]


def config(case, world):
    weights = case.get("weights", "fp32_master")
    return {
        "train_batch_size": 4 * world * case.get("accumulation", 1),
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0 if case.get("per_layer") else 1.0,
        "bf16": {"enabled": weights != "fp32"},
        "zero_optimization": {"stage": case["stage"], "reduce_bucket_size": 400_000} | case.get("zero", {}),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "sltrain": {
            "model": {"config": MODEL, "activation_checkpointing": case.get("checkpointing", "none")},
            "method": case.get("method", {"name": "sltrain", "rank": 32, "density": 0.03, "alpha": 8}),
            "precision": {"weights": weights},
            "per_layer_update": case.get("per_layer", False),
            "op_mode": "compose",  # which is what the estimate counts
            "loss": case.get("loss", "full"),
            "tokenizer": "t",
            "data": {"dir": "d", "sequence_length": case.get("length", 32)},
            "steps": 3,
        },
    }


@pytest.mark.parametrize(("world", "chosen"), [(1, CASES[1:2]), (4, CASES)])
def test_moments_bound_what_lives(world, chosen):
    script = Path(__file__).with_name("live_engine.py")
    configs = [config(case, world) for case in chosen]
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps([world, [{"peak": found} for found in configs]]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-2000:]
    for case, whole, live in zip(chosen, configs, json.loads(lines[0].removeprefix("RESULT")), strict=True):
        ours = estimate(from_dict(whole, world_size=world)).moments
        for moment, most in live.items():
            assert 0.7 * ours[moment] <= most <= 1.02 * ours[moment], (case, moment, live, ours)
