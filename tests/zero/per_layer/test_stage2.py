"""The per-layer update on one rank: units, clipping, parameters without gradient, checkpoints."""

import deepspeed
import pytest
import torch

from sltrain_ds.checkpoint import resume as checkpoint
from sltrain_ds.checkpoint.reader import open_checkpoint
from sltrain_ds.checkpoint.save import save
from sltrain_ds.config import from_dict
from sltrain_ds.errors import UserError
from sltrain_ds.models import build as models
from sltrain_ds.optim.build import build_optimizer
from sltrain_ds.zero.initialize import initialize, partitioner
from sltrain_ds.zero.per_layer.clipping import UnitClipping
from sltrain_ds.zero.per_layer.units import split_by_unit
from sltrain_ds.zero.start import start

STAGES = pytest.mark.parametrize("stage", [2, 3])


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def per_layer(tiny_config):
    def make(**overrides):
        return tiny_config(**{"sltrain__per_layer_update": True, "sltrain__clipping": "lagged", **overrides})

    return make


def engine_of(config, stage=2):
    config["zero_optimization"]["stage"] = stage
    run = from_dict(config)
    return run, initialize(model=models.build(run, "cpu", partitioner(run)), config=run)[0]


def batch(step):
    return torch.randint(384, (2, 16), generator=torch.Generator().manual_seed(step))


def train(engine, run, steps):
    """The losses of some steps, each on a batch of its own."""
    losses = []
    for step in steps:
        for micro in range(run.accumulation):
            tokens = batch(1000 * step + micro)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
    return losses


def whole(engine):
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_tensor")]):
        return [p.detach().clone() for p in parameters]


def test_units_are_blocks_embedding_and_head(per_layer):
    run = from_dict(per_layer(sltrain__method__lr_scale={"factors": 0.5}))
    model = models.build(run)
    optimizer = build_optimizer(model, run)
    split_by_unit(model, optimizer)
    names = [group["name"] for group in optimizer.param_groups]
    block = ["factors", "sparse", "norms"]
    assert names == [
        "embedding/dense",
        *(f"layers.{i}/{role}" for i in (0, 1) for role in block),
        "head/dense",
        "head/norms",
    ]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert {group["name"].split("/")[1]: group["lr_scale"] for group in optimizer.param_groups}["factors"] == 0.5


@STAGES
def test_gradients_are_gone_when_backward_ends(per_layer, stage):
    _, engine = engine_of(per_layer(train_batch_size=2, scheduler=None), stage)
    before = whole(engine)
    tokens = batch(0)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    assert all(p.grad is None for p in engine.module.parameters())
    engine.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, whole(engine), strict=True)]
    names = [name for name, _ in engine.module.named_parameters()]
    assert [name for name, did in zip(names, moved, strict=True) if not did and not name.endswith(".A")] == []
    engine.destroy()


@STAGES
@pytest.mark.parametrize("clipping", ["per_layer", "lagged"])
def test_resume_is_exact(per_layer, tmp_path, stage, clipping):
    settings = {
        "sltrain__clipping": clipping,
        "gradient_clipping": 0.05,
        "sltrain__checkpoint__dir": str(tmp_path / "c"),
    }
    settings |= {"bf16": {"enabled": True}, "sltrain__precision": {"states": "8bit"}}
    run, engine = engine_of(per_layer(**settings), stage)
    train(engine, run, range(3))
    saved = save(engine, run, 3, 0)
    names, read = dict(engine.module.named_parameters()), open_checkpoint(saved)  # what export reads
    for name, weight in zip(names, whole(engine), strict=True):
        assert torch.equal(read.tensor(name), weight), name
    straight, end = train(engine, run, range(3, 6)), whole(engine)
    engine.destroy()
    run, engine = engine_of(per_layer(**settings), stage)
    checkpoint.resume(engine, run, saved)
    assert train(engine, run, range(3, 6)) == straight
    assert all(torch.equal(a, b) for a, b in zip(whole(engine), end, strict=True))
    engine.destroy()


@STAGES
def test_a_step_that_broke_off_leaves_nothing_behind_a_load(per_layer, tmp_path, stage):
    run, engine = engine_of(per_layer(gradient_clipping=0.05, train_batch_size=2), stage)
    train(engine, run, range(2))
    engine.save_checkpoint(str(tmp_path), tag="saved")
    straight, norm, end = train(engine, run, range(2, 4)), engine.get_global_grad_norm(), whole(engine)

    def breaks(*_):
        raise RuntimeError("out of memory")

    hook = engine.module.model.layers[0].mlp.register_full_backward_hook(breaks)
    with pytest.raises(RuntimeError, match="out of memory"):  # when half of the units have been stepped
        train(engine, run, [7])
    hook.remove()
    engine.load_checkpoint(str(tmp_path), tag="saved")
    assert train(engine, run, range(2, 4)) == straight and engine.get_global_grad_norm() == norm
    assert all(torch.equal(a, b) for a, b in zip(whole(engine), end, strict=True))
    engine.destroy()


@STAGES
def test_a_checkpoint_without_the_update_is_told_apart(per_layer, tmp_path, stage):
    plain = per_layer(sltrain__per_layer_update=False, sltrain__clipping="global")
    _, engine = engine_of(plain, stage)
    engine.save_checkpoint(str(tmp_path), tag="saved")
    engine.destroy()
    _, engine = engine_of(per_layer(), stage)
    with pytest.raises(UserError, match=r"sltrain.per_layer_update: true, but the checkpoint was written without it"):
        engine.load_checkpoint(str(tmp_path), tag="saved")
    engine.destroy()


@STAGES
def test_parameters_without_gradient_are_stepped_with_zeros(per_layer, stage):
    """As stock ZeRO does: weight decay still shrinks them, and the others are as they would be."""
    settings = {"optimizer__params__weight_decay": 0.5, "gradient_clipping": 0.0}
    ends = []
    for on in (True, False):
        run, engine = engine_of(per_layer(sltrain__per_layer_update=on, sltrain__clipping="global", **settings), stage)
        for group in engine.basic_optimizer.param_groups:
            group["fused"] = False
        block = engine.module.model.layers[1]
        block.mlp.forward = lambda x: x  # a branch that takes no part in the loss
        train(engine, run, range(3))
        ends.append(whole(engine))
        engine.destroy()
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_clipping_coefficients():
    start()
    units = [[torch.full((4,), 3.0)], [torch.full((4,), 4.0), torch.zeros(2)]]  # norms 6 and 8, together 10

    def step(clip):
        found = [clip.coefficient(unit) for unit in units]
        return [None if c is None else pytest.approx(float(c), rel=1e-5) for c in found], float(clip.end_step())

    per_layer, lagged = UnitClipping("per_layer", 7.0, None, "cpu"), UnitClipping("lagged", 7.0, None, "cpu")
    assert step(per_layer) == ([1.0, 7 / 8], 10.0)
    assert step(lagged) == ([1.0, 0.7], 10.0)  # no step before the first: the norm of the units so far
    assert step(lagged) == ([0.7, 0.7], 10.0)  # the first unit had 6 of 10, so it foretells 10
    lagged.start_step([9.0, 25.0])  # 3 of 5: the same shares in a step that was half as large
    assert step(lagged) == ([0.7, 0.7], 10.0)
    lagged.start_step([64.0, 100.0])  # 8 of 10: it foretells 7.5
    assert step(lagged) == ([7 / 7.5, 0.7], 10.0)
    lagged.start_step([0.0, 25.0])  # nothing to go by
    assert step(lagged) == ([1.0, 0.7], 10.0)
    assert step(UnitClipping("lagged", 0.0, None, "cpu")) == ([None, None], 10.0)
    assert step(UnitClipping("global", 0.0, None, "cpu")) == ([None, None], 10.0)


def test_clipping_is_by_the_norm_over_all_ranks(monkeypatch):
    start()
    monkeypatch.setattr(UnitClipping, "_over_ranks", lambda self, square: square * 4)  # as four ranks with equal parts
    for mode, expected in (("per_layer", [1.0, 7 / 8]), ("lagged", [1.0, 0.7])):
        clip = UnitClipping(mode, 7.0, None, "cpu")
        found = [float(clip.coefficient([torch.full((1,), norm)])) for norm in (3.0, 4.0)]  # over all 6 and 8
        assert found == pytest.approx(expected, rel=1e-5) and float(clip.end_step()) == pytest.approx(10.0)


@STAGES
def test_a_tight_bound_slows_the_update_of_sgd(per_layer, stage):
    """Adam hides a constant factor, so the coefficient is seen through plain SGD."""
    moved = {}
    for bound in (0.0, 0.01):
        config = per_layer(sltrain__clipping="per_layer", gradient_clipping=bound, train_batch_size=2, scheduler=None)
        config["zero_optimization"]["stage"] = stage
        run = from_dict(config)
        model = models.build(run, "cpu", partitioner(run))
        engine, *_ = initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=run)
        before = whole(engine)
        train(engine, run, [0])
        moved[bound] = dict(zip(dict(model.named_parameters()), map(torch.sub, whole(engine), before), strict=True))
        engine.destroy()
    block = [name for name in moved[0.0] if "layers.1." in name]
    assert torch.cat([moved[0.0][name].flatten() for name in block]).norm() > 0.02
    assert float(torch.cat([moved[0.01][name].flatten() for name in block]).norm()) == pytest.approx(0.01, rel=1e-3)


def test_the_start_says_what_accumulation_keeps(per_layer, capsys):
    for batch, said in ((2, False), (8, True)):
        engine = engine_of(per_layer(train_batch_size=batch))[1]
        out = capsys.readouterr().out
        parameters = sum(p.numel() for p in engine.module.parameters())
        assert "per-layer update: 4 units" in out
        assert (f"keeps {4 * parameters / 1e6:,.1f} MB" in out) == said, out
        engine.destroy()


@STAGES
def test_bitsandbytes_states(per_layer, stage):
    run, engine = engine_of(per_layer(sltrain__precision={"states": "8bit", "backend": "bitsandbytes"}), stage)
    losses = train(engine, run, [0, 0, 0, 0, 0, 0])
    assert losses[-1] < losses[0]
    zero, inner = engine.optimizer, engine.basic_optimizer
    for i, pieces in enumerate(zero.pieces):
        for piece in pieces:
            small = inner.param_groups[zero.group_of(i)]["name"].endswith("norms") or piece.master.numel() < 4096
            assert inner.state[piece.master]["state1"].dtype == (torch.float32 if small else torch.uint8)
    assert any(piece.master.numel() >= 4096 for pieces in zero.pieces for piece in pieces)
    engine.destroy()
