"""The per-layer update gives the numbers of stock ZeRO on 1, 2 and 4 real ranks."""

import json
from pathlib import Path

import pytest
from ranks import launch

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).with_name("run_per_layer.py")
FULL_RANK = {"sltrain__method": {"name": "full_rank"}}
PRECISIONS = {
    "fp32": {},
    "master": {"bf16": {"enabled": True}},
    "bf16": {"bf16": {"enabled": True}, "sltrain__precision": {"weights": "bf16"}},
    "8bit": {"bf16": {"enabled": True}, "sltrain__precision": {"states": "8bit", "weights": "bf16_stochastic"}},
    "fp32-8bit": {"sltrain__precision": {"states": "8bit"}},
}


def variants() -> dict[str, dict]:
    found = {}
    for stage in (2, 3):
        for i, (precision, settings) in enumerate(PRECISIONS.items()):
            for accumulation in (1, 4):
                found[f"z{stage}-{precision}-a{accumulation}"] = {
                    **settings,
                    "zero_optimization__stage": stage,
                    "train_batch_size": 8 if accumulation == 1 else 16,
                    "accumulation": accumulation,
                    "sltrain__model__activation_checkpointing": ("none", "reentrant", "non_reentrant")[i % 3],
                }
        found[f"z{stage}-full_rank"] = {**FULL_RANK, "zero_optimization__stage": stage, "accumulation": 1}
        found[f"z{stage}-tied"] = {
            "sltrain__model__config__tie_word_embeddings": True,
            "zero_optimization__stage": stage,
            "accumulation": 4,
        }
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_every_variant_equals_stock_zero(tiny_config, tmp_path, world):
    configs = {}
    for name, settings in variants().items():
        settings = dict(settings)
        accumulation = settings.pop("accumulation")
        batch = settings.get("train_batch_size", 8)
        configs[name] = tiny_config(
            sltrain__per_layer_update=True, gradient_clipping=0.0, sltrain__steps=4,
            train_micro_batch_size_per_gpu=batch // accumulation // world, **settings,
        )  # fmt: skip
    configs["wrong"] = configs["z2-fp32-a1"] | {"wrong_lr": True}
    path, out = tmp_path / "configs.json", tmp_path / "out.json"
    path.write_text(json.dumps(configs))
    process = launch(world, WORKER, path, out, cwd=tmp_path)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    result = json.loads(out.read_text())
    wrong = result.pop("wrong")
    for name, found in result.items():
        assert found["weights"] == found["states"] == 0, (name, found)
        assert found["norm"] < 1e-5, (name, found)
    assert wrong["weights"] > 1e-6
