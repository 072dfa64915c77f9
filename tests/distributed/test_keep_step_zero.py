"""op_mode keep_step under ZeRO: its one gradient a step is the whole of it, on every stage, checkpointed or not."""

import json
from pathlib import Path

import pytest
from ranks import launch

pytestmark = pytest.mark.distributed
VARIANTS = [(0, "none"), (1, "none"), (2, "reentrant"), (3, "none"), (3, "non_reentrant")]


def test_losses_are_those_of_compose(tiny_config, tmp_path):
    configs = {
        f"{stage} {kind} {mode}": tiny_config(
            zero_optimization__stage=stage, sltrain__op_mode=mode, sltrain__model__activation_checkpointing=kind,
            train_micro_batch_size_per_gpu=1,
        )
        for stage, kind in VARIANTS for mode in ("compose", "keep_step")
    }  # fmt: skip
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    out = tmp_path / "losses.json"
    worker = Path(__file__).with_name("run_variants.py")
    process = launch(2, worker, tmp_path / "configs.json", out, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    losses = json.loads(out.read_text())
    for stage, kind in VARIANTS:
        plain, held = (losses[f"{stage} {kind} {mode}"] for mode in ("compose", "keep_step"))
        assert len(held) == 5 and held == pytest.approx(plain, rel=1e-5), (stage, kind)
