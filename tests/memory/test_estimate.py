import json
import subprocess
import sys
from pathlib import Path

import pytest

from sltrain_ds.cli import main
from sltrain_ds.config import from_dict, load
from sltrain_ds.errors import UserError
from sltrain_ds.memory.estimate import CATEGORIES, estimate

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def config(stage=2, bf16=True, micro=4, **block):
    return {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "sltrain": {
            "model": {"preset": "llama_60m"},
            "method": {"name": "sltrain", "rank": 128, "density": 0.03, "alpha": 32},
            "tokenizer": "t", "data": {"dir": "d"}, "steps": 10, **block,
        },
    }  # fmt: skip


def of(world=1, **keys):
    return estimate(from_dict(config(**keys), world_size=world))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_every_shipped_config(path, gpus):
    try:
        run = load(path, [], world_size=gpus, check_files=False)
    except UserError as error:
        pytest.skip(str(error))  # a batch that does not divide by so many GPUs
    result = estimate(run)
    assert tuple(result.bytes) == CATEGORIES
    assert result.total == sum(result.bytes.values()) == result.moments["backward"]
    assert result.peak >= result.total > 0 and all(size >= 0 for size in result.moments.values())
    if run.sltrain.method.name == "sltrain":
        assert result.bytes["weights"] < result.dense.bytes["weights"]
        assert result.dense.bytes["index"] == result.dense.bytes["workspace"] == 0


def test_known_bytes_of_60m():
    result = of(stage=2, precision={"states": "32bit", "weights": "fp32_master"})
    parameters = sum(result.parameters.values())
    assert f"{parameters / 1e6:.1f}" == "43.5"
    assert result.bytes["masters"] == 4 * parameters and result.bytes["states"] == 8 * parameters
    assert result.bytes["weights"] == 2 * parameters
    assert result.bytes["workspace"] == 2 * 512 * 1376
    attention, mlp = int(0.03 * 512 * 512), int(0.03 * 512 * 1376)
    rows = 4 * (4 * 513 + 2 * 1377 + 513)
    assert result.bytes["index"] == 8 * (rows + 2 * (4 * attention + 3 * mlp))


def test_sharding_and_stages():
    by_stage = {stage: of(world=8, stage=stage) for stage in (1, 2, 3)}
    for stage, result in by_stage.items():
        one = of(world=1, stage=stage)
        assert one.bytes["states"] / 8 <= result.bytes["states"] < 1.01 * one.bytes["states"] / 8
        assert one.bytes["masters"] / 8 <= result.bytes["masters"] < 1.01 * one.bytes["masters"] / 8
        assert result.bytes["index"] == one.bytes["index"]  # buffers are never sharded
    assert by_stage[1].bytes["weights"] == by_stage[2].bytes["weights"] > 2 * by_stage[3].bytes["weights"]
    assert by_stage[1].bytes["gradients"] > by_stage[2].bytes["gradients"]


def test_eight_bit_states_are_a_quarter_of_fp32_ones():
    wide = of(precision={"states": "32bit", "weights": "fp32_master"}).bytes["states"]
    narrow = of(precision={"states": "8bit", "weights": "fp32_master"}).bytes["states"]
    assert narrow == pytest.approx(wide / 4 * (1 + 4 / 256), rel=1e-3)


def test_activation_levers():
    base = of().bytes["activations"]
    assert of(micro=8).bytes["activations"] == 2 * base
    assert of(loss="chunked").bytes["activations"] < base
    checkpointed = of(model={"preset": "llama_60m", "activation_checkpointing": "reentrant"})
    assert checkpointed.bytes["activations"] < base


def test_full_rank_has_no_dense_surplus():
    result = of(method={"name": "full_rank"})
    assert result.bytes == result.dense.bytes
    assert {name: row.millions for name, row in result.paper.items()}["sltrain"] == "43.5"  # the paper's recipe


def test_paper_rows_follow_the_run():
    result = of(method={"name": "low_rank", "rank": 64, "alpha": 32})
    assert result.paper["low_rank"].parameters == sum(result.parameters.values())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config()))
    return path


def test_json_form_is_stable(file, capsys):
    assert main(["estimate", str(file), "--gpus", "2", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert list(out) == ["config", "format", "gpus", "zero_stage", "tokens_per_micro_batch", "parameters", "bytes",
                         "moments", "dense", "paper"]  # fmt: skip
    assert list(out["bytes"]) == [*CATEGORIES, "total"] and out["format"] == 1 and out["gpus"] == 2
    assert list(out["moments"]) == ["initialize", "backward", "step", "peak"]
    assert out["paper"]["sltrain"]["printed"] == {"millions": "43.5", "gigabytes": "0.27"}


def test_table_and_overrides(file, capsys):
    assert main(["estimate", str(file), "--set", "sltrain.method.rank=64"]) == 0
    out = capsys.readouterr().out
    assert "sltrain" in out and "activations" in out and "at its peak" in out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--gpus", "0"], "GPUs"),
        (["--set", "zero_optimization.zero_quantized_weights=true"], "zero_quantized_weights"),
        (["--set", "sltrain.model.preset=llama_61m"], "preset"),
    ],
)
def test_mistakes_take_one_line(file, capsys, arguments, word):
    assert main(["estimate", str(file), *arguments]) == 2
    captured = capsys.readouterr()
    assert word in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_needs_neither_torch_nor_deepspeed(file):
    heavy = "{'torch', 'deepspeed', 'transformers'}"
    code = f"import sys; from sltrain_ds.cli import main; main(['estimate', {str(file)!r}]); "
    code += f"sys.exit(not {heavy}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
