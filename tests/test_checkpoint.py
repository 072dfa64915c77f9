"""What a resumed run takes from its checkpoint and what from its config."""

import pytest

from sltrain_ds import checkpoint, models
from sltrain_ds.config import from_dict
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
