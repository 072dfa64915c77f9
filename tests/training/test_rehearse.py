"""A rehearsed rank holds what a real one does, and the meter's categories add up."""

import json
import os
import subprocess
import sys

import pytest

from sltrain_ds.cli import main
from sltrain_ds.training.meter import MOMENTS

MODEL = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
METHOD = {"name": "sltrain", "rank": 16, "density": 0.05, "alpha": 16}
COMMON = {"sltrain__model": {"config": MODEL}, "sltrain__method": METHOD, "sltrain__steps": 3}


def rehearsed(path, world, *flags):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sltrain_ds.cli", "rehearse", str(path), "--world", str(world), "--json", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("world", "stage", "bf16"), [(2, 2, True), (2, 3, True), (4, 1, False), (4, 3, False)])
def test_equals_a_real_rank(train, tmp_path, world, stage, bf16):
    process, lines = train(world, zero_optimization__stage=stage, bf16={"enabled": bf16}, **COMMON)
    assert process.returncode == 0, process.stderr[-2000:]
    real = [line["memory"] for line in lines if "memory" in line][-1]
    found = rehearsed(tmp_path / "config.json", world)["bytes"]
    for key in ("weights", "index", "states", "masters", "gradients", "buckets", "workspace"):
        assert found[key] == real[key], key
    assert found["tensors"] == pytest.approx(real["tensors"], rel=0.02)
    assert found["activations"] == pytest.approx(real["activations"], rel=0.02)
    # shards are a share: a rank of so many is not a rank alone
    alone = rehearsed(tmp_path / "config.json", 1)["bytes"]
    assert found["states"] < 1.05 * alone["states"] / world


def test_any_rank_of_many_and_the_table(tiny_config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config(train_batch_size=128, **COMMON)))
    found = rehearsed(path, 64, "--rank", "63")
    assert found["world"] == 64 and found["rank"] == 63
    sizes = found["bytes"]
    assert sum(size for key, size in sizes.items() if key not in ("peak", "tensors")) == sizes["peak"]
    assert list(found["moments"]) == list(MOMENTS) and max(found["moments"].values()) == sizes["tensors"]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--world", "2", "--rank", "2"], "--rank 2"),
        (["--world", "2", "--steps", "0"], "--steps"),
        (["--world", "3"], "train_batch_size"),
    ],
)
def test_mistakes_take_one_line(tiny_config, tmp_path, capsys, flags, word):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config()))
    assert main(["rehearse", str(path), *flags]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1
