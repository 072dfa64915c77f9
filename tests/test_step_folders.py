"""What of an earlier run counts as a checkpoint, and when it is deleted."""

import json
from types import SimpleNamespace

import pytest

from sltrain_ds import train
from sltrain_ds.errors import UserError
from sltrain_ds.step_folders import STATE_FILE, complete_checkpoints, step_folders


def checkpoints(folder, *names, whole=True):
    for name in names:
        (folder / name).mkdir(parents=True)
        if whole:
            state = {"step": 2, "tokens": 0, "zero_stage": 2, "world_size": 1, "supports": {}}
            config = {"sltrain": {}, "train_batch_size": 1, "optimizer": {"type": "AdamW"}}
            (folder / name / STATE_FILE).write_text(json.dumps(state | {"config": config}), encoding="utf-8")
    return folder


def test_a_copy_by_another_name_is_no_checkpoint_of_the_run(tmp_path):
    folder = checkpoints(tmp_path, "step_99999999", "step_100000000", "step_00000002", "step_best")
    assert list(step_folders(folder)) == [2, 99_999_999, 100_000_000]
    assert complete_checkpoints(folder)[-1].name == "step_100000000"


def left(tmp_path, **args):
    run = SimpleNamespace(run_dir=tmp_path, checkpoint_dir=tmp_path / "checkpoints")
    return train._left_by_an_earlier_run(run, SimpleNamespace(**{"resume": None, "overwrite": False} | args))


def test_a_run_stopped_while_it_saved_resumes(tmp_path):
    folder = checkpoints(tmp_path / "checkpoints", "step_00000002", "step_best")
    checkpoints(folder, "step_00000004", whole=False)
    assert left(tmp_path, resume="latest") == [folder / "step_00000004"]
    checkpoints(folder, "step_00000006")
    with pytest.raises(UserError, match=r"holds checkpoints after step 2 \(up to step_00000006\)"):
        left(tmp_path, resume=str(folder / "step_00000002"))


def test_overwrite_deletes_nothing_before_the_run_can_start(tmp_path, tiny_config, monkeypatch):
    def fails(run, device):
        raise UserError("sltrain.norm: no apex here")

    monkeypatch.setattr("sltrain_ds.engine.make_engine", fails)
    monkeypatch.setattr("sltrain_ds.zero.start.start", lambda: None)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config(sltrain__run_dir=str(tmp_path / "run"))), encoding="utf-8")
    folder = checkpoints(tmp_path / "run" / "checkpoints", "step_00000002")
    assert train.main([str(config), "--overwrite"]) == 2
    assert complete_checkpoints(folder)
