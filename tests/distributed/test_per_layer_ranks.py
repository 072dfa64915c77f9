"""The per-layer update gives the numbers of stock ZeRO on 1, 2 and 4 real ranks."""

import copy
import json
from pathlib import Path

import pytest
from ranks import launch

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).with_name("run_per_layer.py")
PRECISIONS = {
    "fp32": {},
    "master": {"bf16": {"enabled": True}},
    "bf16": {"bf16": {"enabled": True}, "sltrain__precision": {"weights": "bf16"}},
    "8bit": {"bf16": {"enabled": True}, "sltrain__precision": {"states": "8bit", "weights": "bf16_stochastic"}},
    "fp32-8bit": {"sltrain__precision": {"states": "8bit"}},
}


def variants(stage: int) -> dict[str, dict]:
    """{name: overrides} of micro-batches that are a global batch on one rank."""
    found, zero = {}, {"zero_optimization__stage": stage}
    for i, (precision, settings) in enumerate(PRECISIONS.items()):
        for accumulation in (1, 4):
            found[f"{precision}-a{accumulation}"] = settings | {
                "train_batch_size": 8 * max(1, accumulation // 2),
                "train_micro_batch_size_per_gpu": 8 // min(2, accumulation),
                "sltrain__model__activation_checkpointing": ("none", "reentrant", "non_reentrant")[i % 3],
                # 0: every parameter is let go after use, as those of large models are
                "zero_optimization__stage3_param_persistence_threshold": 0 if accumulation == 4 else 1000,
                "sltrain__steps": 50 if precision in ("fp32", "8bit") and accumulation == 1 else 4,
            }
    found["full_rank"] = {"sltrain__method": {"name": "full_rank"}, "train_micro_batch_size_per_gpu": 8}
    found["tied"] = {"sltrain__model__config__tie_word_embeddings": True, "train_micro_batch_size_per_gpu": 4}
    for settings in found.values():
        settings |= zero | {"sltrain__per_layer_update": True, "gradient_clipping": 0.0}
        settings.setdefault("sltrain__steps", 4)
        if stage != 3:
            settings.pop("zero_optimization__stage3_param_persistence_threshold", None)
    return found


def compare(world, configs, tmp_path) -> dict[str, dict]:
    """With and without, each config's differences; a micro-batch is shared by the ranks."""
    for config in configs.values():
        config["train_micro_batch_size_per_gpu"] //= world
    path, out = tmp_path / "configs.json", tmp_path / "out.json"
    path.write_text(json.dumps(configs))
    process = launch(world, WORKER, path, out, cwd=tmp_path)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    result = json.loads(out.read_text())
    assert set(result) == set(configs)
    return result


@pytest.mark.parametrize("world", [1, 2])
def test_every_variant_equals_stock_zero(tiny_config, tmp_path, world):
    configs = {
        f"z{stage}-{name}": tiny_config(**settings)
        for stage in (2, 3)
        for name, settings in variants(stage).items()
    }  # fmt: skip
    for stage in (2, 3):
        configs[f"wrong{stage}"] = copy.deepcopy(configs[f"z{stage}-bf16-a1"]) | {"wrong_lr": True}
    for name, found in compare(world, configs, tmp_path).items():
        if name.startswith("wrong"):
            assert found["weights"] > 0, "1% of a rate in one group must be seen"
        else:
            assert found["weights"] == found["states"] == 0, (name, found)
            assert found["norm"] < 1e-5, (name, found)
            assert found["losses"][-1] < found["losses"][0], (name, found)


def test_four_ranks_stay_within_rounding(tiny_config, tmp_path):
    """Their sums run in another order than stock's, whose buckets are others."""
    configs = {f"z{stage}": tiny_config(**variants(stage)["fp32-a4"]) for stage in (2, 3)}
    for name, found in compare(4, configs, tmp_path).items():
        assert found["weights"] < 1e-5, (name, found)
        assert found["norm"] < 1e-5, (name, found)
