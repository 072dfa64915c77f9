import numpy as np
import pytest

from sltrain_ds.data.order import BLOCK, assign, epoch_order, key, permute, shares


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 100, 255, 257, 1000, 4097])
def test_permute_is_a_bijection(n):
    for k in range(5):
        assert sorted(permute(np.arange(n), n, key(k))) == list(range(n))


def test_permute_place_by_place_is_permute_of_all():
    n = 1_000_003
    places = np.array([[0, 5], [n - 1, 12345]])
    whole = permute(np.arange(n), n, 99)
    assert (permute(places, n, 99) == whole[places]).all()


def test_permute_reaches_far_without_a_table():
    n = 2**45 + 11
    out = permute(np.arange(1000), n, 1)
    assert len(set(out.tolist())) == 1000 and out.min() >= 0 and out.max() < n
    assert out.max() > n // 2  # no small corner of the range


def test_permute_golden():
    # fixed for all time: a resumed run must see the order it began with
    assert permute(np.arange(10), 10, key("epoch", 42, 0, 0)).tolist() == [4, 6, 2, 8, 9, 1, 7, 3, 5, 0]
    assert permute(np.array([0, 1, 10**9]), 10**10, 7).tolist() == [5313906760, 1965305358, 8337740671]


def test_permute_is_uniform_over_keys():
    n, keys = 7, 4000
    counts = np.zeros((n, n))
    for k in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, key(k))] += 1
    chi2 = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert chi2 < 36 + 5 * np.sqrt(2 * 36)  # (n - 1)^2 degrees of freedom


def test_neighbours_do_not_stay_neighbours():
    n = 10_000
    step = np.abs(np.diff(permute(np.arange(n), n, 3)))
    assert abs(step.mean() - n / 3) < n * 0.02


@pytest.mark.parametrize("n", [1, 3, 10, 97])
def test_every_epoch_holds_each_sequence_once_in_another_order(n):
    order = epoch_order(np.arange(5 * n), n, seed=1).reshape(5, n)
    assert (np.sort(order, axis=1) == np.arange(n)).all()
    if n >= 10:
        assert len({tuple(row) for row in order}) == 5
        assert (order[0] != epoch_order(np.arange(n), n, seed=2)).any()
        assert (order[0] != epoch_order(np.arange(n), n, seed=1, source=1)).any()


def test_epoch_order_of_a_slice_is_the_slice_of_the_order():
    whole = epoch_order(np.arange(100), 13, seed=5)
    for start in range(0, 90, 7):
        assert (epoch_order(np.arange(start, start + 9), 13, seed=5) == whole[start : start + 9]).all()


def test_shares_add_up_and_are_proportional():
    for weights in [(1,), (1, 1), (1, 2, 3), (0.7, 0.2, 0.1), (1e-4, 1.0), (1, 1, 1)]:
        got = shares(weights)
        assert got.sum() == BLOCK
        assert (np.abs(got - np.array(weights) / sum(weights) * BLOCK) < 1).all()


def test_assign_gives_shares_and_numbers_each_source_in_turn():
    weights = (0.5, 0.3, 0.2)
    source, number = assign(np.arange(2 * BLOCK), 0, weights)
    assert (np.bincount(source[:BLOCK]) == shares(weights)).all()
    assert np.abs(np.bincount(source[:2000]) / 2000 - weights).max() < 0.05  # mixed inside a block too
    for s in range(3):
        assert (number[source == s] == np.arange((source == s).sum())).all()
    pieces = [assign(np.arange(start, start + 1000), 0, weights) for start in range(BLOCK - 500, BLOCK + 3500, 1000)]
    assert (np.concatenate([p[0] for p in pieces]) == source[BLOCK - 500 : BLOCK + 3500]).all()
    assert (np.concatenate([p[1] for p in pieces]) == number[BLOCK - 500 : BLOCK + 3500]).all()
    assert (assign(np.arange(BLOCK), 1, weights)[0] != source[:BLOCK]).any()
