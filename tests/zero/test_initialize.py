"""`initialize` as a drop-in: roles keep their rates under every scheduler, foreign models and configs pass."""

import argparse
import json

import pytest
import torch

from sltrain_ds import SLTrainConfig, convert, initialize
from sltrain_ds.config import from_dict
from sltrain_ds.errors import UserError
from sltrain_ds.methods.supports import supports
from sltrain_ds.models import build as models
from sltrain_ds.optim.build import parameter_groups
from sltrain_ds.zero.initialize import partitioner

pytestmark = pytest.mark.usefixtures("one_rank")


SCALE = {"factors": 0.3, "sparse": 0.5, "dense": 1.0}
SCHEDULERS = {
    "WarmupCosineLR": {"total_num_steps": 40, "warmup_num_steps": 4, "cos_min_ratio": 0.1, "warmup_type": "linear"},
    "WarmupLR": {"warmup_max_lr": 0.003, "warmup_num_steps": 4, "warmup_type": "linear"},
    "WarmupDecayLR": {"warmup_max_lr": 0.003, "warmup_num_steps": 4, "total_num_steps": 40, "warmup_type": "linear"},
    "OneCycle": {"cycle_min_lr": 0.0003, "cycle_max_lr": 0.003, "cycle_momentum": False},
    "LRRangeTest": {"lr_range_test_min_lr": 0.003},
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_rates_of_the_roles_keep_their_ratios(tiny_config, scheduler):
    config = tiny_config(
        scheduler={"type": scheduler, "params": SCHEDULERS[scheduler]}, sltrain__method__lr_scale=SCALE
    )
    run = from_dict(config)
    engine, optimizer, _, schedule = initialize(model=models.build(run), config=run)
    for _ in range(10):
        schedule.step()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["dense"] > 0
    for role, scale in SCALE.items():
        assert rates[role] == pytest.approx(scale * rates["dense"]), role
    assert rates["norms"] == rates["dense"]
    engine.destroy()


def test_groups_hold_every_parameter_once_by_role(tiny_config):
    run = from_dict(tiny_config(optimizer__params__weight_decay=0.1))
    model = models.build(run)
    groups = {g["name"]: g for g in parameter_groups(model, 1.0, 0.1, run.sltrain.method.lr_scale)}
    assert set(groups) == {"factors", "sparse", "dense", "norms"}
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    assert len(groups["factors"]["params"]) == 2 * 14 and len(groups["sparse"]["params"]) == 14
    assert {p.dim() for p in groups["norms"]["params"]} == {1}
    assert groups["norms"]["weight_decay"] == 0 and groups["sparse"]["weight_decay"] == 0.1


def test_weights_under_zero_3_are_those_of_the_plain_path(tiny_config):
    import deepspeed

    plain = models.build(from_dict(tiny_config()))
    run = from_dict(tiny_config(zero_optimization__stage=3))
    initialize(model=torch.nn.Linear(2, 2), config=_foreign())[0].destroy()  # joins the ranks
    sharded = models.build(run, "cpu", partitioner(run))
    assert all(hasattr(p, "ds_tensor") for p in sharded.parameters())
    with deepspeed.zero.GatheredParameters(list(sharded.parameters())):
        for (name, a), (other, b) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
            assert name == other and torch.equal(a, b), name
    assert supports(plain) == supports(sharded)


def _foreign():
    return {
        "train_batch_size": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
    }


def test_a_model_and_a_config_without_sltrain_pass_as_they_are(tmp_path):
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(_foreign()))
    model = torch.nn.Linear(4, 4)
    engine, _, loader, schedule = initialize(model=model, model_parameters=model.parameters(), config=str(path))
    before = model.weight.detach().clone()
    engine.backward(engine(torch.ones(2, 4)).square().sum())
    engine.step()
    assert not torch.equal(before, model.weight)
    assert loader is None and schedule is None
    engine.destroy()


@pytest.mark.parametrize("place", ["args", "config_params"])
def test_a_config_may_come_as_deepspeed_takes_it(tmp_path, place):
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(_foreign()))
    given = {"args": argparse.Namespace(deepspeed_config=str(path))} if place == "args" else {place: str(path)}
    engine, *_ = initialize(model=torch.nn.Linear(4, 4), **given)
    assert engine.train_batch_size() == 2
    engine.destroy()


def test_what_cannot_be_initialized_is_said_in_one_line(tiny_config):
    with pytest.raises(UserError, match="no config; pass config"):
        initialize(model=torch.nn.Linear(4, 4))
    config = tiny_config(sltrain__per_layer_update=True, sltrain__clipping="lagged", train_batch_size=2)
    with pytest.raises(UserError, match=r"optimizer must be a torch\.optim\.Optimizer.*got function"):
        initialize(model=models.build(from_dict(config)), config=config, optimizer=lambda p: torch.optim.AdamW(p))


def test_a_model_of_ones_own_takes_the_config(tiny_config):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    own = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    model = convert(own, SLTrainConfig(rank=4, density=0.1, alpha=8))
    engine, optimizer, *_ = initialize(model=model, config=tiny_config())
    assert {g["name"] for g in optimizer.param_groups} == {"factors", "sparse", "dense", "norms"}
    engine.destroy()


def test_apex_norm_without_apex_is_refused_by_name(tiny_config):
    with pytest.raises(UserError, match=r"sltrain\.norm.*apex.*torch"):
        models.build(from_dict(tiny_config(sltrain__norm="apex")))


def test_a_dense_directory_goes_on_full_rank_only(tiny_config, tmp_path):
    run = from_dict(tiny_config(sltrain__method={"name": "full_rank"}))
    dense = models.build(run)
    dense.save_pretrained(tmp_path / "dense")
    model = {"path": str(tmp_path / "dense")}
    again = models.build(from_dict(tiny_config(sltrain__model=model, sltrain__method={"name": "full_rank"})))
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), again.parameters(), strict=True))
    with pytest.raises(UserError, match="full_rank"):
        models.build(from_dict(tiny_config(sltrain__model=model)))


def test_a_converted_directory_goes_on_as_it_was(tiny_config, tmp_path):
    from sltrain_ds.models.converted import save_converted

    config = tiny_config()
    first = models.build(from_dict(config))
    save_converted(first, tmp_path / "converted", config["sltrain"]["method"])
    model = {"path": str(tmp_path / "converted")}
    again = models.build(from_dict(tiny_config(sltrain__model=model)))
    assert supports(again) == supports(first)
    x = torch.randint(0, 384, (2, 16))
    assert torch.equal(first(x).logits, again(x).logits)
    with pytest.raises(UserError, match="low_rank does not fit"):
        models.build(
            from_dict(tiny_config(sltrain__model=model, sltrain__method={"name": "low_rank", "rank": 8, "alpha": 8}))
        )
    with pytest.raises(UserError, match=r"sltrain\.method\.alpha: 99"):
        models.build(from_dict(tiny_config(sltrain__model=model, sltrain__method__alpha=99)))
    bf16 = models.build(from_dict(tiny_config(sltrain__model=model, bf16={"enabled": True})))
    assert bf16.lm_head.weight.dtype == torch.bfloat16
    assert bf16.model.rotary_emb.inv_freq.dtype == torch.float32
