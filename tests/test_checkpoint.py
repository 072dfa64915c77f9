"""What a resumed run takes from its checkpoint and what from its config."""

import pytest

from sltrain_ds import checkpoint, models
from sltrain_ds.config import from_dict
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
