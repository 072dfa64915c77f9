"""The modes of a run: chosen by rank 0 for all, written to config.json and the checkpoint, kept on resume."""

import json
from pathlib import Path

import pytest
from ranks import launch

from sltrain_ds.ops import modes

pytestmark = pytest.mark.distributed
SHAPES = ["48x48", "48x80", "80x48"]


def test_every_rank_computes_as_rank_0_chose(tiny_config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config(sltrain__op_mode={"80x48": "compose"})))
    process = launch(2, Path(__file__).with_name("run_modes.py"), path, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-2000:]
    settled = sorted({"48x48": "factored_dense", "48x80": "factored_dense", "80x48": "compose"}.items())
    for rank in (0, 1):
        assert f"rank {rank}: ['compose', 'factored_dense'] {settled}" in process.stdout


def constants(tmp_path, best):
    """A file by which `best` costs nothing."""
    table = {
        f"cpu.float32.{mode}.{term}": float(mode != best and term == "layer")
        for mode, terms in modes.TERMS.items()
        for term in terms
    }
    path = tmp_path / f"{best}.json"
    path.write_text(json.dumps({"constants": table}))
    return str(path)


def test_the_choice_is_written_and_not_made_again_on_resume(train, tmp_path):
    run = tmp_path / "run"

    def written():
        states = [json.loads(path.read_text())["config"] for path in sorted(run.glob("checkpoints/*/sltrain.json"))]
        return [config["sltrain"]["op_mode"] for config in (json.loads((run / "config.json").read_text()), *states)]

    factored = dict.fromkeys(SHAPES, "factored")
    process, _ = train(1, sltrain__steps=1, sltrain__op_constants=constants(tmp_path, "factored"))
    assert process.returncode == 0, process.stderr[-2000:]
    assert written() == [factored] * 2
    assert ", ".join(f"{shape}: factored" for shape in SHAPES) in process.stdout

    other = constants(tmp_path, "compose")
    process, _ = train(1, "--resume", "latest", sltrain__steps=2, sltrain__op_constants=other)
    assert process.returncode == 0, process.stderr[-2000:]
    assert written() == [factored] * 3
    # unless the config says so
    process, _ = train(1, "--resume", "latest", sltrain__steps=3, sltrain__op_mode="keep", sltrain__op_constants=other)
    assert process.returncode == 0, process.stderr[-2000:]
    assert written()[0] == "keep"
    # what was written runs as it is
    rerun = launch(1, "--module", "sltrain_ds.train", run / "config.json", "--overwrite", cwd=tmp_path)
    assert rerun.returncode == 0 and written()[0] == "keep", rerun.stderr[-2000:]
