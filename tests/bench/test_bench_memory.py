"""bench memory: every saving a row, run in a fresh process or estimated and marked."""

import json

import pytest

from sltrain_ds.bench import memory
from sltrain_ds.cli import main
from sltrain_ds.config import from_dict

KEYS = {
    "bf16": {"enabled": True},
    "train_batch_size": 2,
    "gradient_clipping": 1.0,
    "sltrain__model__activation_checkpointing": "non_reentrant",
    "sltrain__precision": {"states": "8bit"},
    "sltrain__per_layer_update": True,
    "sltrain__clipping": "lagged",
    "sltrain__loss": "chunked",
}


@pytest.fixture
def recipe(tiny_config, tmp_path):
    data = tiny_config(**KEYS)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(data))
    return path, data


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["bench", "memory", "--steps", "0"], "--steps 0: must be at least 1"),
        (["bench", "op", "--pairs", "0"], "--pairs 0: must be at least 1"),
        (["bench", "op", "--out", __file__], "is a file; give a directory"),
        (["rehearse", "nowhere.json", "--world", "0"], "--world 0: must be at least 1"),
    ],
)
def test_options_are_refused_before_anything_is_measured(words, line, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert line in said.err and not said.out


def test_rows_take_away_one_saving_each(recipe):
    path, data = recipe
    own = from_dict(data)
    rows = memory.waterfall(own)
    assert [row.name[:14] for row in rows] == [
        "nothing saved:", "- index row-wi", "- no saved cop", "- activation c", "- loss in chun", "- no fp32 mast",
        "- gradients la",
    ]  # fmt: skip
    cases = [memory.measure(path, data, row, 1, "cpu", run_it=False) for row in [*rows, *memory.contenders(own)]]
    assert {case["how"] for case in cases} == {"estimated"}
    needs = [case["estimate"] for case in cases[: len(rows)]]
    # checkpointing has no place in the peak of a model whose optimizer step is larger
    assert needs == sorted(needs, reverse=True) and needs[0] > needs[1] > needs[2] > needs[-1]
    assert needs[-1] == cases[len(rows) - 1]["estimate"] and rows[-1].keys == {}
    assert all(case["estimate"] > needs[-1] for case in cases[len(rows) :])


def test_an_fp32_recipe_has_no_masters_to_save(tiny_config):
    data = tiny_config(**KEYS | {"bf16": None})
    own = from_dict(data)
    rows = memory.waterfall(own)
    assert "- no fp32 masters" not in [row.name for row in rows]
    for row in [*rows, *memory.contenders(own)]:
        assert memory.measure("recipe.json", data, row, 1, "cpu", run_it=False)["estimate"] > 0, row.name


def test_runs_the_recipe_on_real_tokens(recipe, tmp_path, capsys):
    path, _ = recipe
    assert main(["bench", "memory", "--config", str(path), "--rows", "own", "--out", str(tmp_path / "out")]) == 0
    cases = json.loads((tmp_path / "out" / "memory.json").read_text())["cases"]
    run = [case for case in cases if case["how"] == "run"]
    assert len(run) == 1 and "gradients layer by layer" in run[0]["row"]
    found = run[0]["measured"]
    assert found["tokens"] == "real" and len(found["losses"]) == 2 and found["losses"][0] > 0
    assert found["bytes"]["tensors"] < found["bytes"]["peak"]
    assert found["bytes"]["weights"] < 0.1 * found["bytes"]["peak"]
    assert "| GaLore, 8-bit states" in (tmp_path / "out" / "memory.md").read_text()


def test_what_does_not_fit_is_marked(recipe, monkeypatch):
    path, data = recipe
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0.6e9)
    case = memory.measure(path, data, memory.Row("as it is"), 1, "cpu")
    assert case["how"].startswith("estimated: 0.0 GB free") and case["measured"] is None
    assert memory.table_row(case)[4] == case["estimate"] / 1e9


def test_takes_sltrain_recipes_alone(tiny_config, tmp_path, capsys):
    path = tmp_path / "full.json"
    path.write_text(json.dumps(tiny_config(sltrain__method={"name": "full_rank"})))
    assert main(["bench", "memory", "--config", str(path)]) == 2
    assert "sltrain.method.name" in capsys.readouterr().err
