"""Measuring, with a clock of the test's own: no real time decides here."""

import itertools

import pytest
import torch

from sltrain_ds.ops import measure_modes, spmm, workspace
from sltrain_ds.ops.measure_modes import Layer, measure, of_a_step, race


class Clock:
    """Gives each run the times that are listed for it, the last one again and again; counts the rounds it was in."""

    def __init__(self, **times):
        self.times = {name: itertools.chain(listed, itertools.repeat(listed[-1])) for name, listed in times.items()}
        self.order = []

    def __call__(self, run, calls, device):
        self.order.append(run)
        return next(self.times[run])

    def race(self, seconds=1e9, sums=None):
        return race({name: name for name in self.times}, sums or {n: {n: 1.0} for n in self.times}, seconds, timer=self)


@pytest.fixture(autouse=True)
def no_call_is_short(request, monkeypatch):
    if "short" not in request.node.name:
        monkeypatch.setattr(measure_modes, "SHORT", 0.0)


def test_a_short_first_call_rules_nobody_out():
    clock = Clock(compose=[1.0], factored=[4.9, 0.9])
    assert clock.race(seconds=100.0)["factored"] == 0.9
    clock = Clock(compose=[1.0], factored=[5.1, 0.9])
    assert clock.race(seconds=100.0)["factored"] == 5.1


def test_the_fewest_seconds_of_all_rounds_count():
    clock = Clock(compose=[2.0, 1.2, 1.0, 1.3], factored=[2.0, 1.3, 1.1, 0.9, 1.3])
    assert clock.race() == {"compose": 1.0, "factored": 0.9}
    assert len(clock.order) == 2 * (measure_modes.ROUNDS + 1)
    assert clock.order[:6] == ["compose", "factored", "factored", "compose", "compose", "factored"]


def test_what_is_clearly_slower_drops_out():
    clock = Clock(compose=[1.0], factored=[1.1], keep=[2.0], factored_dense=[3.1])
    assert clock.race()["factored_dense"] == 3.1
    # after the warm-up, after one round more, never
    assert [clock.order.count(name) for name in ("factored_dense", "keep")] == [1, 2]
    assert clock.order.count("compose") == clock.order.count("factored") == measure_modes.ROUNDS + 1


def test_one_that_is_left_need_not_go_on():
    clock = Clock(compose=[1.0], factored=[4.0], held=[0.5])
    clock.race()
    assert clock.order.count("compose") == 1


def test_held_is_no_contender():
    clock = Clock(compose=[1.0], factored=[1.1], held=[0.1])
    assert clock.race()["held"] == 0.1 and clock.order.count("factored") == measure_modes.ROUNDS + 1


def test_rounds_end_with_the_seconds_that_there_are():
    clock = Clock(compose=[1.0], factored=[1.0])
    clock.race(seconds=5.0)
    assert len(clock.order) == 4  # two rounds of 2 s; a third would end at 6
    clock = Clock(compose=[9.0], factored=[9.0])
    clock.race(seconds=5.0)
    assert len(clock.order) == 2  # one there is always


def test_a_mode_may_be_a_sum_of_parts_and_takes_no_less_than_one():
    clock = Clock(many=[3.0], few=[1.0], factored=[5.0])
    found = clock.race(sums={"compose": {"many": 2.0, "few": -1.0}, "factored": {"factored": 1.0}})
    assert found == {"compose": 5.0, "factored": 5.0}
    clock = Clock(many=[1.0], few=[3.0], factored=[2.0])
    found = clock.race(sums={"compose": {"many": 2.0, "few": -1.0}, "factored": {"factored": 1.0}})
    assert found["compose"] == 1.0


def test_keep_step_shares_what_is_done_once_a_step():
    times = {"compose": 5.0, "keep": 4.0, "held": 2.0}
    assert of_a_step(times, 4) == {"compose": 5.0, "keep": 4.0, "keep_step": 2.5}
    assert of_a_step(times, 1) == {"compose": 5.0, "keep": 4.0}


def test_candidates(monkeypatch):
    monkeypatch.setattr(spmm, "available", lambda device: device.type == "cpu")
    assert measure_modes.candidates("cpu") == ["factored", "compose", "factored_dense"]
    assert measure_modes.candidates("cuda", keep=True) == ["compose", "factored_dense", "keep"]
    assert measure_modes.candidates("cpu", held=True)[-2:] == ["keep", "held"]  # which keep_step is told from


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("rate", [1e12, 1.0], ids=["whole", "slices"])
def test_every_mode_is_really_run(monkeypatch, bias, recomputed, rate):
    monkeypatch.setattr(measure_modes, "_rate", lambda layer, timer: rate)
    names = measure_modes.candidates("cpu", keep=True, held=True)
    layer = Layer(48, 32, 8, 60, 40, torch.bfloat16, bias=bias, recomputed=recomputed)
    ran = []

    def timer(run, calls, device):
        run()
        ran.append(run)
        return 1.0

    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = measure(layer, names, timer=timer)
    assert set(found) == set(names) and min(found.values()) > 0 and len(set(ran)) >= len(names)
    assert torch.equal(before, torch.get_rng_state()) and workspace.nbytes() == 0


@pytest.mark.parametrize("tokens", [1, 2, 40, 3000])
@pytest.mark.parametrize("rate", [1e3, 1e9, 1e11])
def test_slices_add_up_to_the_layer(monkeypatch, tokens, rate):
    """A clock by which every pass takes its operations, and W's own cost, exactly: what is found is the whole's."""
    monkeypatch.setattr(measure_modes, "_pass", lambda layer, name, rows, tokens, forwards: (name, rows, tokens))
    layer = Layer(640, 512, 64, 9830, tokens)

    def cost(name, rows, count):
        return measure_modes._operations(layer, name, rows, count)

    names = measure_modes.candidates("cpu", keep=True, held=True)
    runs, sums = measure_modes._parts(layer, names, rate, 0.8)
    for name in names:
        found = sum(count * cost(*runs[part]) for part, count in sums[name].items())
        assert found == pytest.approx(cost(name, 640, tokens), rel=1e-9)
