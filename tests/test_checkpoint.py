"""What a resumed run takes from its checkpoint, from its config and from what an earlier run left behind."""

import shutil

import pytest

from sltrain_ds import checkpoint, models
from sltrain_ds.config import from_dict
from sltrain_ds.errors import UserError
from sltrain_ds.train import _check_run_dir, _parse
from sltrain_ds.zero.checkpoint_reader import STATE_FILE
from sltrain_ds.zero.initialize import initialize, partitioner


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("MASTER_PORT", "29795")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def engine_of(tiny_config):
    def make(**overrides):
        run = from_dict(tiny_config(train_batch_size=2, **overrides))
        return run, initialize(model=models.build(run, "cpu", partitioner(run)), config=run)[0]

    return make


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_bound_on_gradients_is_the_configs(engine_of, stage):
    """A run that stopped for its gradients is told to set one and to resume."""
    run, engine = engine_of(zero_optimization__stage=stage, gradient_clipping=0.0)
    saved = checkpoint.save(engine, run, 1, 0)
    engine.destroy()
    run, engine = engine_of(zero_optimization__stage=stage, gradient_clipping=0.5)
    checkpoint.resume(engine, run, saved)
    assert engine.optimizer.clip_grad == 0.5
    engine.destroy()


def test_a_save_that_was_cut_short_does_not_stand_in_the_way(engine_of):
    run, engine = engine_of()
    first = checkpoint.save(engine, run, 1, 0)
    second = checkpoint.save(engine, run, 2, 0)
    engine.destroy()
    shutil.copytree(first, first.with_name("step_00000001.kept"))
    latest, back = (_parse(["config.json", "--resume", which]) for which in ("latest", str(first)))
    _check_run_dir(run, latest)
    with pytest.raises(UserError, match=r"--resume: .* after step 1 \(up to step_00000002\)"):
        _check_run_dir(run, back)
    (second / STATE_FILE).unlink()  # written last: without it the rest may be missing
    assert checkpoint.find("latest", run) == first.resolve()
    _check_run_dir(run, latest)
    _check_run_dir(run, back)
    assert second.exists()
    _check_run_dir(run, _parse(["config.json", "--resume", "latest", "--overwrite"]))
    assert not second.exists() and first.exists()
