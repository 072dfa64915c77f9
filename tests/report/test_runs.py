import json
import math

import pytest

from sltrain_ds.errors import UserError
from sltrain_ds.report.curves import smoothed
from sltrain_ds.report.runs import read


def test_reads_a_run(make_run):
    run = read([make_run()])[0]
    assert (run.name, run.method, len(run.steps), len(run.evals)) == ("run", "sltrain", 60, 3)
    assert run.baselines == {"unigram": 60.0, "bigram": 20.0} and run.notes == [] and run.world_size == 1
    steps, losses = run.column("loss")
    assert steps == list(range(1, 61)) and losses[0] == pytest.approx(2 + 2 * math.exp(-1 / 20))


def test_a_cut_last_line_is_told_once(make_run):
    folder = make_run()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "loss": 2.0')
    run = read([folder])[0]
    assert len(run.steps) == 60
    assert len(run.notes) == 1 and "is incomplete" in run.notes[0]


def test_a_resumed_run_counts_each_step_once(make_run):
    folder = make_run()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 50, "loss": 9.0}) + "\n")
    steps, losses = read([folder])[0].column("loss")
    assert steps == list(range(1, 61)) and losses[49] == 9.0


def test_what_is_not_finite_becomes_a_gap(make_run):
    folder = make_run()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "loss": NaN, "grad_norm": Infinity}\n')
    _, losses = read([folder])[0].column("loss")
    assert math.isnan(losses[-1]) and math.isnan(read([folder])[0].column("grad_norm")[1][-1])
    assert all(math.isfinite(value) for value in smoothed(losses))


def test_names_tell_runs_apart(make_run):
    first, second, third = make_run("a/run"), make_run("b/run"), make_run("c")
    assert [run.name for run in read([first, second, third])] == ["a/run", "b/run", "c"]


def _drop(name):
    return lambda folder: (folder / name).unlink()


def _write(name, text):
    return lambda folder: (folder / name).write_text(text)


BROKEN = {
    "no config": (_drop("config.json"), "config.json"),
    "damaged config": (_write("config.json", "{"), "config.json"),
    "not a run": (_write("config.json", "{}"), "sltrain"),
    "no object": (_write("config.json", "[]"), "object"),
    "no metrics": (_drop("metrics.jsonl"), "metrics.jsonl"),
    "empty metrics": (_write("metrics.jsonl", ""), "no step"),
    "damaged line": (_write("metrics.jsonl", '{"step": 1, "loss": 1}\n{"ste\n{"step": 2, "loss": 1}\n'), "line 2"),
    "no step": (_write("metrics.jsonl", '{"loss": 1}\n{"step": 2, "loss": 1}\n'), "line 1"),
    "a finished line cut": (_write("metrics.jsonl", '{"step": 1, "loss": 1}\n{"ste\n'), "line 2"),
    "no object in a line": (_write("metrics.jsonl", '3\n{"step": 2, "loss": 1}\n'), "line 1"),
    "damaged baselines": (_write("baselines.json", "x"), "baselines.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_runs_take_one_line(make_run, case):
    damage, word = BROKEN[case]
    folder = make_run()
    damage(folder)
    with pytest.raises(UserError) as error:
        read([folder])
    assert word in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_repeated_directories(make_run, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        read([tmp_path / "nowhere"])
    folder = make_run()
    with pytest.raises(UserError, match="twice"):
        read([folder, folder])


def test_smoothing_keeps_constants_and_averages():
    assert smoothed([3.0] * 100).tolist() == [3.0] * 100
    assert smoothed([0.0, 3.0, 0.0]).tolist() == [1.5, 1.0, 1.5]
    assert math.isnan(smoothed([math.nan])[0])
