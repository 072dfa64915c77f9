"""The launcher's entry point on real ranks: resume, export, world sizes, exit codes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bounds import of_sum
from ranks import launch

from sltrain_ds.cli import main

pytestmark = pytest.mark.distributed
MIXED = {"bf16": {"enabled": True}, "sltrain__precision": {"states": "8bit"}}


def losses(lines):
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def evaluations(lines):
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def check(process):
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]


@pytest.mark.parametrize(("stage", "world", "states"), [(1, 2, "4bit"), (2, 2, "8bit"), (3, 2, "4bit")])
def test_resume_continues_and_the_export_gives_the_same_loss(train, tiny, tmp_path, capsys, stage, world, states):
    settings = dict(
        MIXED,
        sltrain__precision={"states": states},
        zero_optimization__stage=stage,
        sltrain__steps=6,
        sltrain__loss="chunked",
    )
    settings |= {"sltrain__checkpoint__every": 3}
    process, straight = train(world, **settings)
    check(process)
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints" / "step_00000006")  # as if the run had been killed after step 3's checkpoint
    process, resumed = train(world, "--resume", "latest", **settings)
    check(process)
    assert losses(resumed) == losses(straight)
    assert evaluations(resumed) == evaluations(straight)
    back = ["--resume", str(run / "checkpoints" / "step_00000003")]
    process, _ = train(world, *back, **settings)
    assert process.returncode == 2 and "step_00000006" in process.stderr and "--overwrite" in process.stderr
    assert losses(resumed)[6] < losses(resumed)[1]

    assert main(["export", str(run), str(tmp_path / "export")]) == 0
    capsys.readouterr()
    evaluate = ["eval", str(tmp_path / "export"), "--data", str(tiny["data"]), "--sequence-length", "32"]
    assert main([*evaluate, "--tokens", "2000", "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["loss"] == pytest.approx(evaluations(resumed)[6], rel=2e-3)  # W is merged and rounded to bf16 once
    assert json.loads((run / "config.json").read_text())["sltrain"]["steps"] == 6


def test_a_resumed_run_takes_the_rates_of_its_config(train):
    process, _ = train(1, sltrain__steps=2, scheduler=None)
    check(process)
    process, lines = train(1, "--resume", "latest", sltrain__steps=3, scheduler=None, optimizer__params__lr=0.0001)
    check(process)
    assert [line["lr"] for line in lines if "lr" in line] == [0.003, 0.003, 0.0001]


def test_four_ranks_train_on_the_same_global_batches_as_one(train, tmp_path):
    process, one = train(1, sltrain__run_dir=str(tmp_path / "one"))
    check(process)
    # the resolved file of the first run, on another number of ranks
    resolved = tmp_path / "one" / "config.json"
    out = tmp_path / "four"
    process = launch(
        4, "--module", "sltrain_ds.train", resolved, "--set", f"sltrain.run_dir={out}",
        "--set", f"sltrain.checkpoint.dir={out}/checkpoints", cwd=tmp_path,
    )  # fmt: skip
    check(process)
    four = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    mean = of_sum(torch.float32, 8 * 32)  # over the tokens of a batch
    assert losses(four) == pytest.approx(losses(one), rel=mean)
    assert evaluations(four) == pytest.approx(evaluations(one), rel=mean)
    norms = [{line["step"]: line["grad_norm"] for line in lines if "loss" in line} for lines in (one, four)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_bad_input_is_one_line_and_exit_code_2_through_the_launcher(train):
    process, lines = train(2, zero_optimization__stagee=2)
    said = [line for line in process.stderr.splitlines() if "sltrain-ds: error:" in line]
    assert process.returncode == 2
    assert said and "stagee" in said[0] and "stage" in said[0]
    assert "Traceback" not in process.stdout + process.stderr
    assert not lines


def test_a_run_directory_is_not_overwritten_unasked(train, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    process, _ = train(1)
    assert process.returncode == 2
    assert "--resume latest" in process.stderr
    assert (run / "metrics.jsonl").read_text() == '{"step": 1, "loss": 3.0}\n'


def test_resume_that_does_not_fit_is_refused(train, tmp_path):
    process, _ = train(1, sltrain__steps=1)
    check(process)
    process, _ = train(2, "--resume", "latest")
    assert process.returncode == 2
    assert "--num_gpus 1" in process.stderr
    process, _ = train(1, "--resume", "latest", sltrain__seed=7)
    assert process.returncode == 2
    assert "sltrain.seed" in process.stderr and "set it back" in process.stderr
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("step_*"))
    for file in Path(checkpoint).glob("*model_states.pt"):
        torch.save({"module": print}, file)
    process, _ = train(1, "--resume", "latest")
    assert process.returncode == 2, "a checkpoint that could run code must be refused"
    assert "model_states.pt" in process.stderr


def test_ranks_with_different_supports_are_stopped(tiny_config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config()))
    process = launch(2, Path(__file__).with_name("run_disagreeing.py"), path, cwd=tmp_path)
    assert process.returncode == 2, process.stderr[-2000:]
    assert "support of model.layers.0.self_attn.q_proj differs between ranks" in process.stdout
