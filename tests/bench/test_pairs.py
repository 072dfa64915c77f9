import pytest

from sltrain_ds.bench import pairs
from sltrain_ds.bench.pairs import interleave, ratio


def test_ratio_is_the_median_of_the_pairs_not_the_ratio_of_medians():
    # pairwise 2, 2, 0.5, 2, 1; the medians alone would say 3 / 2
    assert ratio([2.0, 4.0, 3.0, 6.0, 1.0], [1.0, 2.0, 6.0, 3.0, 1.0]) == 2.0
    assert ratio([1.0, 9.0], [2.0, 3.0]) == 1.75


def test_every_round_runs_everybody_once_and_turns_the_order():
    order = []
    times = interleave({name: lambda name=name: order.append(name) for name in "abc"}, rounds=4, burst=0.0)
    assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4, "c": 4}
    warm_up, rounds = order[:6], order[6:]
    assert warm_up == list("aabbcc") and rounds == list("abcbcacababc")


def test_time_ends_the_rounds_but_not_before_the_least():
    runs = {"a": lambda: None, "b": lambda: None}
    assert len(interleave(runs, rounds=50, seconds=0.0, least=3)["a"]) == 3
    assert len(interleave(runs, rounds=2, seconds=0.0, least=3)["a"]) == 2


def test_short_runs_are_repeated_to_fill_a_burst():
    calls = []
    interleave({"short": lambda: calls.append(1)}, rounds=1, burst=0.001)
    assert len(calls) > 10


@pytest.mark.parametrize("device, least", [("cuda", 0.02), ("cpu", 0.002)])
def test_bursts_on_a_gpu_are_long_and_sized_without_the_wait_of_a_lone_call(monkeypatch, device, least):
    """A device that takes 30 us to answer and 10 us a call."""
    wait, each, calls = 30e-6 if device == "cuda" else 0.0, 10e-6, []
    monkeypatch.setattr(pairs.timing, "seconds", lambda run, n, device: calls.append(n) or each + wait / n)
    interleave({"short": None}, rounds=1, device=device)
    assert calls[-1] * each == pytest.approx(least, rel=0.02)  # a lone call would have said a quarter of it
