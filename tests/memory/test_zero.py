"""Weights, masters, states and index against a real DeepSpeed engine, byte for byte."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sltrain_ds.memory.count import Shape, count
from sltrain_ds.memory.zero import Settings, held

MODEL = {"vocab_size": 96, "hidden_size": 52, "intermediate_size": 92, "num_hidden_layers": 2, "num_attention_heads": 2}
SLTRAIN = {"name": "sltrain", "rank": 7, "density": 0.03, "alpha": 8}
LOW_RANK = {"name": "low_rank", "rank": 7, "alpha": 8}
FULL_RANK = {"name": "full_rank"}
TARGETS = ["self_attn", "mlp"]

GRID = [
    {"stage": stage, "weights": weights, "states": states, "method": SLTRAIN}
    for stage, weights in [(0, "fp32"), *[(s, w) for s in (1, 2, 3) for w in ("fp32", "fp32_master", "bf16")]]
    for states in ("32bit", "8bit", "4bit")
]
OTHERS = [
    {"stage": 2, "weights": "bf16", "states": "8bit", "method": FULL_RANK},
    {"stage": 3, "weights": "fp32_master", "states": "8bit", "method": LOW_RANK},
    {"stage": 3, "weights": "fp32_master", "states": "32bit", "method": SLTRAIN,
     "zero": {"stage3_param_persistence_threshold": 400, "sub_group_size": 3000}},
    {"stage": 2, "weights": "fp32_master", "states": "32bit", "method": SLTRAIN, "zero": {"parameter_alignment": True}},
    {"stage": 2, "weights": "bf16", "states": "8bit", "method": SLTRAIN, "backend": "bitsandbytes"},
    {"stage": 3, "weights": "bf16", "states": "8bit", "method": SLTRAIN, "backend": "bitsandbytes"},
    {"stage": 3, "weights": "bf16", "states": "4bit", "method": FULL_RANK, "zero": {"sub_group_size": 3000}},
]  # fmt: skip


def run_like(case, world):
    """What `Settings.of` reads of a RunConfig."""
    zero = {"stage": case["stage"], "reduce_bucket_size": 20000, **case.get("zero", {})}
    return SimpleNamespace(
        deepspeed={"zero_optimization": zero},
        zero_stage=case["stage"],
        bf16=case["weights"] != "fp32",
        weights=case["weights"],
        accumulation=1,
        world_size=world,
        sltrain=SimpleNamespace(precision=SimpleNamespace(states=case["states"], backend=case["backend"])),
    )


@pytest.mark.parametrize(("world", "chosen"), [(1, GRID[::4]), (2, GRID), (8, OTHERS)])
def test_bytes_of_a_live_engine(world, chosen):
    cases = [{"backend": "torch" if case["states"] == "32bit" else "ours", **case, "model": MODEL} for case in chosen]
    script = Path(__file__).with_name("live_engine.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps([world, cases]), capture_output=True, text=True, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-2000:]
    for case, live in zip(cases, json.loads(lines[0].removeprefix("RESULT")), strict=True):
        model = count(Shape.of(MODEL), SimpleNamespace(**case["method"], target_modules=TARGETS))
        ours = held(model.by_group(), Settings.of(run_like(case, world), world))
        found = {key: getattr(ours, key) for key in ("weights", "masters", "states")}
        assert {**found, "index": sum(s.bytes for s in model.supports)} == live, case
