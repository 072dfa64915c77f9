"""The optimizer of a run, as ZeRO steps it."""

import pytest
import torch

from sltrain_ds.config import from_dict
from sltrain_ds.models import build as models
from sltrain_ds.zero.initialize import initialize, partitioner

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize(("stage", "per_layer"), [(1, False), (2, False), (3, False), (2, True), (3, True)])
def test_bitsandbytes_keeps_the_norms_in_32_bits_and_nothing_else(tiny_config, stage, per_layer):
    """The biases are there to make the norms of the model, and of a block, more than bitsandbytes quantises."""
    size = {"hidden_size": 64, "intermediate_size": 4096 if per_layer else 1024, "mlp_bias": True}
    config = tiny_config(
        zero_optimization__stage=stage, sltrain__method={"name": "full_rank"}, gradient_clipping=0.0,
        train_batch_size=2, sltrain__per_layer_update=per_layer,
        sltrain__precision={"states": "8bit", "backend": "bitsandbytes"},
    )  # fmt: skip
    config["sltrain"]["model"]["config"] |= size
    run = from_dict(config)
    engine = initialize(model=models.build(run, "cpu", partitioner(run)), config=run)[0]
    tokens = torch.arange(32).view(2, 16)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    inner, zero = engine.basic_optimizer, engine.optimizer
    if stage == 3:  # its parameters are in the groups while states are saved
        zero._set_fp32_optimizer_param_groups()
    formats = {}
    for group in inner.param_groups:
        large = [p for p in group["params"] if p.numel() >= 4096]
        formats.setdefault(group["name"].endswith("norms"), set()).update(inner.state[p]["state1"].dtype for p in large)
    assert formats[False] == {torch.uint8}
    assert formats[True] == {torch.float32}
    engine.destroy()
