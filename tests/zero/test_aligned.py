"""States of our own do not depend on how ZeRO cuts parameters: real ranks, every stage, given gradients."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from ranks import launch

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).with_name("aligned_worker.py")
BF16 = {"bf16__enabled": True}
FORMATS = {
    "fp32": {},
    "master": BF16 | {"sltrain__precision__weights": "fp32_master"},
    "nearest": BF16 | {"sltrain__precision__weights": "bf16"},
    "stochastic": BF16,
}


def configs(tiny_config):
    base = {
        "sltrain__method": {"name": "full_rank"}, "gradient_clipping": 0.0, "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1, "scheduler": None,
        "optimizer__params": {"lr": 0.01, "weight_decay": 0.1},
    }  # fmt: skip
    variants = {
        f"z{stage} {states} {name}": {**settings, "zero_optimization__stage": stage}
        for stage in (1, 2, 3)
        for states in ("8bit", "4bit")
        for name, settings in FORMATS.items()
        if name == "stochastic" or (stage > 1 and (states == "8bit" or name == "fp32"))
    }
    # other ways to lay out and to gather the same
    variants["z2 8bit fp32 round-robin"] = {
        "zero_optimization__stage": 2,
        "zero_optimization__round_robin_gradients": True,
    }
    variants["z3 8bit fp32 fine"] = {
        "zero_optimization__stage": 3,
        "zero_optimization__stage3_param_persistence_threshold": 20,
        "zero_optimization__sub_group_size": 1000,
        "zero_optimization__contiguous_gradients": False,
    }
    for name, settings in variants.items():
        settings["sltrain__precision__states"] = name.split()[1]
    return {name: tiny_config(**base, **settings) for name, settings in variants.items()}


def whole(folder):
    """{variant: {parameter key: [weights, states...]}}: the ranks' slices joined, in the order of their offsets."""
    found = defaultdict(dict)
    for path in sorted(folder.glob("rank_*.pt")):
        for variant, slices in torch.load(path).items():
            found[variant] |= slices
    joined = {}
    for variant, slices in found.items():
        joined[variant] = {}
        for key in {key for key, _ in slices}:
            parts = [slices[at] for at in sorted(slices) if at[0] == key]
            joined[variant][key] = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    return joined


def test_the_same_gradients_give_the_same_bytes_at_every_world_size_and_stage(tiny_config, tmp_path):
    (tmp_path / "configs.json").write_text(json.dumps(configs(tiny_config)))
    results = {}
    for world in (1, 2, 4):
        folder = tmp_path / str(world)
        folder.mkdir()
        process = launch(world, WORKER, tmp_path / "configs.json", folder, cwd=tmp_path, timeout=300)
        assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
        results[world] = whole(folder)
    for world, variants in results.items():
        for variant, parameters in variants.items():
            _, states, kind, *_ = variant.split()
            expected = results[1][f"z2 {states} {kind}"]
            assert parameters.keys() == expected.keys() and len(parameters) == 6
            for key, tensors in parameters.items():
                for found, wanted in zip(tensors, expected[key], strict=True):
                    assert torch.equal(found, wanted), (world, variant, key)
