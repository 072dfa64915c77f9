import base64
import re

import pytest
from tiny_runs import model, save_checkpoint

from sltrain_ds.cli import main
from sltrain_ds.report.build import build
from sltrain_ds.report.runs import read


def images(page):
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def cells(page):
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    head = re.findall(r"<th>(.*?)</th>", rows[0])
    return [dict(zip(head, re.findall(r"<td>(.*?)</td>", row), strict=True)) for row in rows[1:]]


@pytest.fixture
def trained(make_run):
    folder = make_run()
    save_checkpoint(folder, model())
    return folder


def test_one_run(trained, tmp_path):
    path = build([trained], tmp_path / "out", ["layers.0"])
    page = path.read_text()
    pngs = sorted((tmp_path / "out").glob("*.png"))
    assert len([p for p in pngs if p.name.startswith("matrix-0.")]) == 7
    assert {"loss.png", "schedule.png", "memory.png", "residual.png"} <= {p.name for p in pngs}
    assert sorted(images(page)) == sorted(p.read_bytes() for p in pngs)
    assert all(image.startswith(b"\x89PNG") for image in images(page))
    # opens without a network, and asks for nothing
    assert "<script" not in page and "http" not in re.sub(r'src="data:[^"]+"', "", page)
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "7 of 14 matrices" in page
    row = cells(page)[0]
    assert row["run"] == "run" and row["method"] == "sltrain" and row["steps"] == "60"
    assert row["val. loss"] == "2.500" and row["val. perplexity"] == "12.18" and row["before"] == "54.6"
    assert row["unigram"] == "60.0" and row["bigram"] == "20.0"
    own = sum(p.numel() for p in model().parameters())
    dense = sum(p.numel() for p in model("full_rank").parameters())
    assert row["params (M)"] == f"{own / 1e6:.2f}" and row["of dense"] == f"{own / dense:.0%}"
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_several_runs_share_the_plots(make_run, tmp_path):
    folders = []
    for method in ("sltrain", "full_rank", "low_rank"):
        folder = make_run(method, method)
        save_checkpoint(folder, model(method), method)
        folders.append(folder)
    page = build(folders, tmp_path / "out", ["q_proj"]).read_text()
    assert [row["method"] for row in cells(page)] == ["sltrain", "full_rank", "low_rank"]
    assert len(list((tmp_path / "out").glob("matrix-*.png"))) == 2  # one a matrix, whatever the number of runs


def test_a_run_without_weights_says_so(make_run, tmp_path):
    page = build([make_run()], tmp_path / "out").read_text()
    assert "no checkpoint and no export" in page and len(images(page)) == 3


def test_world_size_comes_from_the_checkpoint(trained):
    assert read([trained])[0].world_size == 2


def test_what_cannot_be_estimated_is_noted(make_run, tmp_path):
    folder = make_run()
    text = (folder / "config.json").read_text().replace('"stage": 2', '"stage": 3, "zero_quantized_weights": true')
    (folder / "config.json").write_text(text)
    page = build([folder], tmp_path / "out").read_text()
    assert "no memory estimate: zero_optimization.zero_quantized_weights" in page
    assert "memory.png" in {p.name for p in (tmp_path / "out").iterdir()}  # what was measured is shown still


def test_again_with_other_matrices(trained, tmp_path):
    build([trained], tmp_path / "out", ["layers.0"])
    build([trained], tmp_path / "out", ["layers.1.mlp"])
    names = {p.name for p in (tmp_path / "out").glob("matrix-*.png")}
    assert names == {f"matrix-1.mlp.{kind}_proj.png" for kind in ("gate", "up", "down")}


def test_names_are_escaped(make_run, tmp_path):
    page = build([make_run("a<b>&c")], tmp_path / "out").read_text()
    assert "a&lt;b&gt;&amp;c" in page and "a<b>" not in page


def test_command_line(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["report", str(trained), "--out", str(out), "--layers", "0.self_attn.q_proj"]) == 0
    assert str(out / "index.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["{tmp}/nowhere", "--out", "{tmp}/out"], "nowhere"),
        (["{run}", "--out", "{run}/config.json"], "--out"),
        (["{run}", "--out", "{tmp}/out", "--layers", "layers.9"], "--layers"),
        (["{run}", "--out", "{tmp}/out", "--rank", "0"], "--rank"),
    ],
)
def test_mistakes_take_one_line(trained, tmp_path, capsys, arguments, word):
    arguments = [argument.format(tmp=tmp_path, run=trained) for argument in arguments]
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr().err
    assert word in captured and captured.count("\n") == 1
    assert not (tmp_path / "out").exists()
