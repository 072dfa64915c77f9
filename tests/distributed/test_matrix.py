"""Every "yes" of the README's matrix trains and resumes exactly, on 2 real ranks."""

import json
from pathlib import Path

import pytest
from ranks import launch

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).with_name("run_variants.py")
METHODS = {
    "sltrain": {"name": "sltrain", "rank": 8, "density": 0.05, "alpha": 16},
    "full_rank": {"name": "full_rank"},
    "low_rank": {"name": "low_rank", "rank": 8, "alpha": 16},
}
BF16 = {"bf16": {"enabled": True}}


def precision(**values):
    return {"sltrain__precision": values}


def variants():
    """{name: overrides}: methods x stages x precisions, and the other features in turn across them."""
    found = {}
    for stage in (0, 1, 2, 3):
        precisions = {
            "fp32": {},
            "fp32-8bit": precision(states="8bit"),
            "fp32-bitsandbytes": precision(states="8bit", backend="bitsandbytes"),
        }
        if stage:
            precisions |= {
                "master": BF16,
                "master-8bit": BF16 | precision(states="8bit", weights="fp32_master"),
                "bf16": BF16 | precision(weights="bf16"),
                "bf16-8bit": BF16 | precision(states="8bit", weights="bf16"),
                "stochastic-8bit": BF16 | precision(states="8bit"),
                "stochastic-4bit": BF16 | precision(states="4bit"),
            }
        for i, (name, settings) in enumerate(precisions.items()):
            method = list(METHODS)[(i + stage) % 3] if name in ("fp32-8bit", "bf16") else "sltrain"
            found[f"{method}-z{stage}-{name}"] = {
                **settings,
                "sltrain__method": METHODS[method],
                "zero_optimization__stage": stage,
                "train_micro_batch_size_per_gpu": (4, 2, 1)[i % 3],  # accumulation 1, 2, 4
                "gradient_clipping": (0.0, 0.5)[i % 2],
                "sltrain__model__activation_checkpointing": ("none", "reentrant", "non_reentrant")[(i + stage) % 3],
                "sltrain__loss": ("full", "chunked")[i % 2],
            }
    for stage in (0, 2, 3):
        for method in ("full_rank", "low_rank"):
            found[f"{method}-z{stage}"] = {"sltrain__method": METHODS[method], "zero_optimization__stage": stage}
    return found


def test_every_combination_trains_and_resumes_exactly(tiny_config, tmp_path):
    configs = {name: tiny_config(sltrain__steps=6, **settings) for name, settings in variants().items()}
    path, out = tmp_path / "configs.json", tmp_path / "losses.json"
    path.write_text(json.dumps(configs))
    process = launch(2, WORKER, path, out, "--resume", cwd=tmp_path, timeout=600)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    result = json.loads(out.read_text())
    assert set(result) == set(configs)
    for name, (straight, resumed) in result.items():
        assert resumed == straight, name
        assert straight[-1] < straight[0] - 0.01, (name, straight)
    # the same numbers in another format stay close
    exact = result["sltrain-z0-fp32"][0]
    for name, (straight, _) in result.items():
        if name.startswith("sltrain"):
            assert straight[0] == pytest.approx(exact[0], rel=5e-3), name
