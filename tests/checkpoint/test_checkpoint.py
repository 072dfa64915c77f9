"""What a resumed run takes from its checkpoint and what from its config."""

import resource
import shutil

import pytest

from sltrain_ds.checkpoint import resume as checkpoint
from sltrain_ds.checkpoint.save import save
from sltrain_ds.checkpoint.step_folders import STATE_FILE, complete_checkpoints
from sltrain_ds.config import from_dict
from sltrain_ds.errors import UserError
from sltrain_ds.models import build as models
from sltrain_ds.zero.initialize import initialize, partitioner

pytestmark = pytest.mark.usefixtures("one_rank")


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
    saved = save(engine, run, 1, 0)
    engine.destroy()
    run, engine = engine_of(zero_optimization__stage=stage, gradient_clipping=0.5)
    checkpoint.resume(engine, run, saved)
    assert engine.optimizer.clip_grad == 0.5
    engine.destroy()


@pytest.mark.parametrize(
    ("stage", "key", "default", "other"),
    [
        (1, "round_robin_gradients", False, True),
        (2, "parameter_alignment", False, True),
        (3, "sub_group_size", 1_000_000_000, 2000),
    ],
)
def test_another_layout_of_the_partitions_is_refused(engine_of, tiny_config, stage, key, default, other):
    """On two ranks round_robin_gradients was read without a word, and each weight took the values of others."""
    run, engine = engine_of(zero_optimization__stage=stage)
    saved = str(save(engine, run, 1, 0))
    engine.destroy()

    def asked(value):
        zero = {"zero_optimization__stage": stage, f"zero_optimization__{key}": value}
        return from_dict(tiny_config(train_batch_size=2, **zero))

    assert checkpoint.find(saved, asked(default)).name == "step_00000001"
    with pytest.raises(UserError, match=rf"^zero_optimization.{key}: .*; set it back$"):
        checkpoint.find(saved, asked(other))


def test_a_full_disk_is_said_in_one_line(engine_of):
    run, engine = engine_of()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a write fails in the middle of a file
    try:
        with pytest.raises(UserError, match=r"step_00000002: the checkpoint could not be written, .*; make room"):
            save(engine, run, 2, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.find("latest", run)
    engine.destroy()


def test_a_damaged_or_missing_file_is_not_resumed_from(engine_of):
    run, engine = engine_of()
    saved = save(engine, run, 1, 0)
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"):
        content = (saved / name).read_bytes()
        middle = len(content) // 2
        (saved / name).write_bytes(content[:middle] + bytes(b ^ 0xFF for b in content[middle : middle + 64])
                                   + content[middle + 64 :])  # fmt: skip
        with pytest.raises(UserError, match=rf"{name}: damaged"):
            checkpoint.resume(engine, run, saved)
        (saved / name).write_bytes(content)
    (saved / name).unlink()  # DeepSpeed itself stops at an assertion without a word
    with pytest.raises(UserError, match=rf"{name}: no such file"):
        checkpoint.resume(engine, run, saved)
    engine.destroy()


def test_a_checkpoint_that_is_being_dropped_counts_as_incomplete(engine_of, monkeypatch):
    run, engine = engine_of(sltrain__checkpoint__keep=1)
    old = save(engine, run, 1, 0)

    def stopped(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        save(engine, run, 2, 0)
    assert (old / "mp_rank_00_model_states.pt").is_file() and not (old / STATE_FILE).exists()
    assert [path.name for path in complete_checkpoints(old.parent)] == ["step_00000002"]
    engine.destroy()
