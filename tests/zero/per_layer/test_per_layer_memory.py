"""What the per-layer update never allocates: masters beside the weights, gradients of more than a unit."""

import json
from pathlib import Path

import pytest
from ranks import launch

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).with_name("per_layer_memory_worker.py")
MODEL = {
    "vocab_size": 384, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 16,
}  # fmt: skip
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}, "sltrain__precision": {"weights": "bf16"}},
    "8bit": {"bf16": {"enabled": True}, "sltrain__precision": {"states": "8bit", "weights": "bf16_stochastic"}},
}


@pytest.mark.parametrize(("world", "limit"), [(1, 1.1), (2, 1.6)])
def test_peaks_of_construction_and_of_backward(tiny_config, tmp_path, world, limit):
    configs = {
        f"z{stage}-{name}": tiny_config(
            sltrain__per_layer_update=True, gradient_clipping=1.0, sltrain__clipping="lagged",
            sltrain__model={"config": MODEL}, sltrain__method={"name": "full_rank"}, train_batch_size=world,
            train_micro_batch_size_per_gpu=1, zero_optimization__stage=stage, sltrain__data__sequence_length=2,
            **precision,
        )
        for stage in (2, 3)
        for name, precision in PRECISIONS.items()
    }  # fmt: skip
    path, out = tmp_path / "configs.json", tmp_path / "out.json"
    path.write_text(json.dumps(configs))
    process = launch(world, WORKER, path, out, cwd=tmp_path)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    for name, found in json.loads(out.read_text()).items():
        assert found["init"] <= 1.3, (name, found)
        assert 0.3 * found["unit"] < found["gradients"] <= limit * found["unit"], (name, found)
