"""The choice of a mode: by the rule, from times, under a memory budget."""

import pytest
import torch

from sltrain_ds.config import op_mode
from sltrain_ds.errors import UserError
from sltrain_ds.methods.sltrain_layer import SLTrainLinear
from sltrain_ds.ops import modes, spmm

WIDE, TALL = "64x32", "32x64"


def test_the_rule_goes_by_arithmetic_where_s_has_to_be_dense(monkeypatch):
    # T = 4/3 out in / (out + in) = 2730.7 for 4096 x 4096
    assert modes.rule(4096, 4096, 2730, "cuda") == "factored_dense"
    assert modes.rule(4096, 4096, 2731, "cuda") == "compose"
    monkeypatch.setattr(spmm, "available", lambda device: True)
    assert {modes.rule(4096, 4096, tokens, "cpu") for tokens in (1, 32768)} == {"factored"}
    monkeypatch.setattr(spmm, "available", lambda device: False)
    assert modes.rule(64, 64, 4096, "cpu") == "compose"


def test_the_fastest_unless_chance_decides():
    assert modes.fastest({"compose": 1.0, "factored": 1.0 + modes.NOISE / 2}) == "factored"
    assert modes.fastest({"compose": 1.0, "factored": 1.0 + 2 * modes.NOISE}) == "compose"
    assert modes.fastest({"factored_dense": 0.99, "compose": 1.0, "factored": 1.5}) == "compose"
    assert set(modes.ORDER) == set(modes.CHOICES) - {"auto"}


def times(compose, factored, keep=None, keep_step=None):
    found = {"compose": compose, "factored": factored, "keep": keep, "keep_step": keep_step}
    return {mode: seconds for mode, seconds in found.items() if seconds is not None}


def plan(found, budget, layers=3):
    """Each layer holds 10 bytes in keep, 20 in keep_step."""

    def held(shape, mode):
        return layers * (20 if mode == "keep_step" else 10)

    def fits(chosen):
        return sum(held(shape, mode) for shape, mode in chosen.items() if mode in modes.HOLDING) <= budget

    return modes.plan(found, dict.fromkeys(found, layers), held, fits)


def test_weights_are_held_where_they_fit_and_save_time():
    found = {WIDE: times(4.0, 3.0, keep=2.0)}
    assert plan(found, 29) == {WIDE: "factored"} and plan(found, 30) == {WIDE: "keep"}
    assert plan({WIDE: times(4.0, 3.0, keep=9.0)}, 1000) == {WIDE: "factored"}
    assert plan({WIDE: times(4.0, 3.0, keep=3.0 - modes.NOISE)}, 1000) == {WIDE: "factored"}  # for nothing


def test_a_budget_goes_where_a_byte_saves_most():
    found = {WIDE: times(4.0, 5.0, keep=2.0), TALL: times(4.0, 5.0, keep=3.0)}
    assert plan(found, 29) == {WIDE: "compose", TALL: "compose"}
    assert plan(found, 59) == {WIDE: "keep", TALL: "compose"}
    assert plan(found, 60) == {WIDE: "keep", TALL: "keep"}


def test_a_sum_over_micro_batches_takes_the_place_of_a_weight_if_it_is_faster():
    assert plan({WIDE: times(4.0, 5.0, keep=3.0, keep_step=1.0)}, 60) == {WIDE: "keep_step"}
    assert plan({WIDE: times(4.0, 5.0, keep=3.0, keep_step=1.0)}, 59) == {WIDE: "keep"}
    assert plan({WIDE: times(4.0, 5.0, keep=1.0, keep_step=3.0)}, 60) == {WIDE: "keep"}


def test_the_config_knows_the_same_modes():
    assert set(op_mode.MODES) == set(modes.CHOICES)


def test_modes_by_shape():
    def layer(out, in_):
        return SLTrainLinear(in_, out, rank=2, density=0.1, alpha=2)

    model = torch.nn.ModuleList([layer(8, 6), layer(6, 8), layer(8, 6)])
    modes.set_op_mode(model, {"8x6": "keep"})
    assert [x.op_mode for x in modes.layers(model)] == ["keep", "auto", "keep"]
    modes.set_op_mode(model, "factored")
    assert {x.current_mode for x in model} == {"factored"}
    with pytest.raises(UserError, match="op_mode"):
        modes.set_op_mode(model, {"8x6": "fast"})
