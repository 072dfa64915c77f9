"""What of an earlier run counts as a checkpoint, which of them fit, and when they are deleted."""

import json
from types import SimpleNamespace

import pytest

from sltrain_ds import train
from sltrain_ds.checkpoint import resume as checkpoint
from sltrain_ds.checkpoint.step_folders import STATE_FILE, complete_checkpoints, step_folders
from sltrain_ds.config import from_dict
from sltrain_ds.errors import UserError


@pytest.fixture
def run(tiny_config, tmp_path):
    return from_dict(tiny_config(sltrain__run_dir=str(tmp_path / "run"), scheduler=None))


def save(run, *names, whole=True):
    """Checkpoints as a run leaves them, without their tensors; ``whole`` False: stopped while they were written."""
    state = {"step": 2, "tokens": 0, "zero_stage": 2, "world_size": 1, "supports": {}, "config": run.to_json()}
    for name in names:
        (run.checkpoint_dir / name).mkdir(parents=True)
        if whole:
            (run.checkpoint_dir / name / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    return run.checkpoint_dir


def left(run, **args):
    return train._left_by_an_earlier_run(run, SimpleNamespace(**{"resume": None, "overwrite": False} | args))


def test_a_copy_by_another_name_is_no_checkpoint_of_the_run(run):
    folder = save(run, "step_99999999", "step_100000000", "step_00000002", "step_best")
    assert list(step_folders(folder)) == [2, 99_999_999, 100_000_000]
    assert complete_checkpoints(folder)[-1].name == "step_100000000"


def test_a_run_stopped_while_it_saved_resumes(run):
    folder = save(run, "step_00000002", "step_best")
    save(run, "step_00000004", whole=False)
    assert left(run, resume="latest") == [folder / "step_00000004"]
    save(run, "step_00000006")
    with pytest.raises(UserError, match=r"holds checkpoints after step 2 \(up to step_00000006\)"):
        left(run, resume=str(folder / "step_00000002"))


def test_overwrite_deletes_nothing_before_the_run_can_start(run, tmp_path, monkeypatch):
    def fails(run, device):
        raise UserError("sltrain.norm: no apex here")

    monkeypatch.setattr("sltrain_ds.training.engine.make_engine", fails)
    monkeypatch.setattr("sltrain_ds.zero.start.start", lambda: None)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(run.to_json()), encoding="utf-8")
    folder = save(run, "step_00000002")
    assert train.main([str(config), "--overwrite"]) == 2
    assert complete_checkpoints(folder)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sltrain__method__rank": 4}, "sltrain.method.rank: .* was trained with 8, this config says 4; set it back"),
        ({"zero_optimization__stage": 3}, "zero_optimization.stage: 3, but .* was written by stage 2"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: .* was trained without one, .*; remove it"),
    ],
)
def test_what_does_not_fit_is_said_by_its_key_before_anything_is_built(run, tiny_config, changes, line):
    save(run, "step_00000002")
    assert checkpoint.find("latest", run).name == "step_00000002"
    changed = tiny_config(**{"sltrain__run_dir": str(run.run_dir), "scheduler": None} | changes)
    with pytest.raises(UserError, match=line):
        checkpoint.find("latest", from_dict(changed))
