"""What a resumed run takes from its checkpoint and what from its config."""

import resource

import pytest

from sltrain_ds import checkpoint, models
from sltrain_ds.config import from_dict
from sltrain_ds.errors import UserError
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
    saved = checkpoint.save(engine, run, 1, 0)
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
    saved = str(checkpoint.save(engine, run, 1, 0))
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
        with pytest.raises(
            UserError, match=r"^sltrain\.checkpoint\.dir: rank 0 cannot write all of .*step_00000002; make"
        ):
            checkpoint.save(engine, run, 2, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.find("latest", run)
    engine.destroy()
