"""The modes of a run: chosen by rank 0 for all, written to config.json and the checkpoint, kept on resume."""

import json
from pathlib import Path

import pytest
from ranks import launch

from sltrain_ds.config import from_dict
from sltrain_ds.models import build as models
from sltrain_ds.ops import measure_modes, mode_cache, modes
from sltrain_ds.zero import agree_on_modes as agreement

SHAPES = ["48x48", "48x80", "80x48"]


@pytest.mark.distributed
def test_every_rank_computes_as_rank_0_measured(tiny_config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config(sltrain__op_mode={"80x48": "compose"})))
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = launch(2, Path(__file__).with_name("run_modes.py"), path, cwd=tmp_path, **cache)
    assert process.returncode == 0, process.stderr[-2000:]
    settled = sorted({"48x48": "factored_dense", "48x80": "factored_dense", "80x48": "compose"}.items())
    for rank in (0, 1):
        assert f"rank {rank}: ['compose', 'factored_dense'] {settled}" in process.stdout
    assert process.stdout.count("rank 0 measures") == 2 and "rank 1 measures" not in process.stdout


@pytest.mark.distributed
def test_the_choice_is_written_and_not_made_again_on_resume(train, tmp_path):
    run = tmp_path / "run"

    def written():
        states = [json.loads(path.read_text())["config"] for path in sorted(run.glob("checkpoints/*/sltrain.json"))]
        return [config["sltrain"]["op_mode"] for config in (json.loads((run / "config.json").read_text()), *states)]

    process, _ = train(1, sltrain__steps=1, sltrain__op_mode=None)
    assert process.returncode == 0, process.stderr[-2000:]
    first = written()[0]
    assert written() == [first] * 2 and list(first) == SHAPES and set(first.values()) <= set(modes.ORDER)
    assert ", ".join(f"{shape}: {mode}" for shape, mode in first.items()) in process.stdout

    process, _ = train(1, "--resume", "latest", sltrain__steps=2, sltrain__op_mode=None)
    assert process.returncode == 0, process.stderr[-2000:]
    assert written() == [first] * 3 and "computes layers as" not in process.stdout
    # unless the config says so
    process, _ = train(1, "--resume", "latest", sltrain__steps=3, sltrain__op_mode="keep")
    assert process.returncode == 0, process.stderr[-2000:]
    assert written()[0] == "keep"
    # what was written runs as it is
    rerun = launch(1, "--module", "sltrain_ds.train", run / "config.json", "--overwrite", cwd=tmp_path)
    assert rerun.returncode == 0 and written()[0] == "keep", rerun.stderr[-2000:]


@pytest.fixture
def agree(monkeypatch, tiny_config, tmp_path):
    """`agree(best, **overrides)` -> (op_mode, what was measured), on one rank, where every mode but `best` is slow."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(agreement.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(agreement.dist, "get_world_size", lambda: 1)

    def call(best="compose", **overrides):
        measured = []

        def measure(layer, names):
            measured.append((layer, names))
            return {name: 1.0 if name in (best, "held") else 2.0 for name in names}

        monkeypatch.setattr(measure_modes, "measure", measure)
        run = from_dict(tiny_config(**{"sltrain__op_mode": None, **overrides}))
        run = agreement.agree_on_modes(models.build(run), run, "cpu")
        return run.sltrain.op_mode, measured

    return call


def test_a_shape_is_measured_once(agree, capsys):
    found, measured = agree("compose", sltrain__op_memory=0)
    assert found == dict.fromkeys(SHAPES, "compose") and len(measured) == 3
    assert "measured in" in capsys.readouterr().out
    found, measured = agree("factored_dense", sltrain__op_memory=0)
    assert found == dict.fromkeys(SHAPES, "compose") and not measured  # as it was measured before
    assert str(mode_cache.path()) in capsys.readouterr().out
    _, measured = agree(sltrain__op_memory=0, sltrain__data__sequence_length=64)
    assert {layer.tokens for layer, _ in measured} == {128}


def test_deterministic_goes_by_the_rule(agree, capsys):
    found, measured = agree("factored_dense", sltrain__deterministic=True)
    assert not measured and "by the fixed rule" in capsys.readouterr().out
    assert found == {shape: modes.rule(*map(int, shape.split("x")), 64, "cpu") for shape in SHAPES}


def test_memory_decides_what_may_be_held(agree):
    found, measured = agree("keep", sltrain__op_memory=0)
    assert all("keep" not in names and "held" not in names for _, names in measured)
    found, _ = agree("keep", sltrain__op_memory=1)
    assert set(found.values()) <= {"keep", "keep_step"}
    found, _ = agree("keep", sltrain__op_memory=1, train_batch_size=2)  # one micro-batch a step
    assert found == dict.fromkeys(SHAPES, "keep")


PER_LAYER = {"sltrain__per_layer_update": True, "gradient_clipping": 0.0, "train_batch_size": 2}


def test_per_layer_update_holds_weights_only_below_another_moments_peak(agree):
    found, _ = agree("keep", **PER_LAYER)
    assert "keep" not in found.values()  # all layers' W, without checkpointing
    checkpointed = PER_LAYER | {"sltrain__model__activation_checkpointing": "non_reentrant"}
    found, _ = agree("keep", **checkpointed)  # the loss over the vocabulary is larger than a block and its W
    assert found == dict.fromkeys(SHAPES, "keep")
    # with more tokens and the loss in chunks the block is the largest, and W would come on top
    more = {"sltrain__loss": "chunked", "sltrain__data__sequence_length": 128, "train_batch_size": 8}
    found, _ = agree("keep", **checkpointed | more | {"train_micro_batch_size_per_gpu": 8})
    assert "keep" not in found.values()
