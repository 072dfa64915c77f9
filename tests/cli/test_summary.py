"""`sltrain-ds summary`: its baselines belong to the data and the budget that they were computed on."""

import json

import pytest

from sltrain_ds.cli import main
from sltrain_ds.config import from_dict
from sltrain_ds.report.runs import read


@pytest.fixture
def run_dir(tiny_config, tmp_path):
    """A function of overrides: a run directory with two evaluations."""

    def make(**overrides):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(from_dict(tiny_config(**overrides)).to_json()))
        lines = [{"step": 0, "eval_loss": 6.0, "eval_perplexity": 403.4}, {"step": 5, "loss": 5.0}]
        lines += [{"step": 5, "eval_loss": 5.0, "eval_perplexity": 148.4}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def baselines(folder):
    assert main(["summary", str(folder)]) == 0
    return json.loads((folder / "baselines.json").read_text())


def test_baselines_are_kept(tiny, run_dir, capsys):
    folder = run_dir()
    first = baselines(folder)
    assert first["of"] == {
        "dir": str(tiny["data"]),
        "sequence_length": 32,
        "mask_documents": False,
        "eval_tokens": 2000,
    }
    assert 1 < first["bigram"] < first["unigram"] < 384
    (folder / "baselines.json").write_text(json.dumps({**first, "bigram": 7.25}))
    capsys.readouterr()
    assert baselines(folder)["bigram"] == 7.25  # as kept, since they are of the same
    out = capsys.readouterr().out
    assert "after 5 steps 148.40" in out and "interpolated bigram 7.25" in out


@pytest.mark.parametrize(
    "change",
    [
        {"sltrain__eval": {"every": 100, "tokens": 1000}},
        {"sltrain__data__sequence_length": 16},
        {"sltrain__data__mask_documents": True},
    ],
)
def test_baselines_of_something_else_are_computed_anew(run_dir, change):
    first = baselines(run_dir())
    again = baselines(run_dir(**change))
    assert again["of"] != first["of"] and again["predicted_tokens"] != first["predicted_tokens"]
    assert again["bigram"] != first["bigram"]


@pytest.mark.parametrize("left", ["", "[1]", '{"unigram": 60.0, "bigram": 20.0}', '{"of": null}'])
def test_what_an_older_or_killed_summary_left(run_dir, left):
    folder = run_dir()
    (folder / "baselines.json").write_text(left)
    assert baselines(folder)["of"]["eval_tokens"] == 2000


def test_the_report_reads_them(run_dir):
    folder = run_dir()
    kept = baselines(folder)
    assert read([folder])[0].baselines == {key: kept[key] for key in ("unigram", "bigram")}
