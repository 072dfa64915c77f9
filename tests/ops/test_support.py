from math import comb, sqrt

import numpy as np
import pytest
import torch

from sltrain_ds.errors import UserError
from sltrain_ds.ops import builder, support

SHAPES = [
    (1, 1, 1.0),
    (1, 7, 0.5),
    (7, 1, 0.6),
    (5, 3, 0.5),
    (64, 64, 1.0),
    (9, 9, 0.0),
    (33, 129, 0.03),
    (3, 70000, 0.001),
]


def flat(out, in_, nnz, seed, name="layer", native=True):
    rows, columns = support.sample(out, in_, nnz, seed, name, native=native)
    return support.to_flat_index(rows, columns, in_)


def z_of_chi_square(observed, expected):
    """How many standard deviations the chi-square statistic lies from its mean."""
    freedom = observed.size - 1
    return (((observed - expected) ** 2 / expected).sum() - freedom) / sqrt(2 * freedom)


@pytest.mark.parametrize("out, in_, density", SHAPES)
def test_exact_count_sorted_and_in_bounds(out, in_, density):
    nnz = support.nnz_of(density, out, in_)
    rows, columns = support.sample(out, in_, nnz, 0, "a", native=False)
    assert columns.numel() == nnz == int(density * out * in_)
    assert rows.dtype == torch.int32 and rows.shape == (out + 1,)
    assert columns.dtype == (torch.uint16 if in_ <= 65536 else torch.int32)
    assert support.check(rows, columns, out, in_) is None
    assert len(set(support.to_flat_index(rows, columns, in_).tolist())) == nnz


@pytest.mark.parametrize("out, in_, density", [*SHAPES, (40, 65536, 0.01), (512, 1376, 0.03)])
def test_native_draws_the_same_bits(out, in_, density):
    if not builder.load():
        pytest.skip(f"no C++ ops: {builder.status()[1]}")
    nnz = support.nnz_of(density, out, in_)
    threads = torch.get_num_threads()
    expected = support.sample(out, in_, nnz, 5, "model.layers.0.mlp.up_proj", native=False)
    for count in (1, 2):
        torch.set_num_threads(count)
        drawn = support.sample(out, in_, nnz, 5, "model.layers.0.mlp.up_proj")
        assert all(a.dtype == b.dtype and torch.equal(a.int(), b.int()) for a, b in zip(drawn, expected, strict=True))
    torch.set_num_threads(threads)


def test_golden_vectors():
    # these may never change within a generator version: checkpoints of generated supports rely on them
    assert support.GENERATOR_VERSION == 1
    assert support.keys(0, "") == GOLDEN_KEYS[0]
    assert support.keys(42, "model.layers.3.self_attn.q_proj") == GOLDEN_KEYS[1]
    rows, columns = support.sample(4, 6, 9, 0, "model.layers.0.mlp.down_proj", native=False)
    assert (rows.tolist(), columns.tolist()) == GOLDEN_SMALL
    for (out, in_, density, seed, name), checksum in GOLDEN_CHECKSUMS.items():
        drawn = support.sample(out, in_, support.nnz_of(density, out, in_), seed, name, native=False)
        assert support.checksum(*drawn) == checksum


def test_a_row_alone_equals_the_whole():
    rows, columns = support.sample(37, 101, 800, 9, "x", native=False)
    for row in range(37):
        first, last = int(rows[row]), int(rows[row + 1])
        alone = support.sample_row(row, last - first, 101, 9, "x")
        assert alone.tolist() == columns[first:last].tolist()


def test_seed_and_name_both_matter():
    draws = [flat(40, 50, 200, seed, name).tolist() for seed in (0, 1) for name in ("a", "b", "a\0", "")]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    common = len(set(draws[0]) & set(draws[1]))  # independent: 200 * 200 / 2000 = 20 in common, std about 4
    assert 2 < common < 40


@pytest.mark.parametrize("out, in_, nnz", [(1, 7, 3), (7, 1, 3), (2, 4, 3), (3, 3, 4), (5, 1, 2), (2, 3, 2)])
def test_tiny_supports_are_uniform_over_all_subsets(out, in_, nnz):
    seeds = 3000
    codes = [sum(1 << p for p in flat(out, in_, nnz, seed).tolist()) for seed in range(seeds)]
    observed = np.unique(codes, return_counts=True)[1]
    observed = np.pad(observed, (0, comb(out * in_, nnz) - observed.size))
    assert abs(z_of_chi_square(observed, seeds / observed.size)) < 4.5


@pytest.mark.parametrize("out, in_", [(11, 13), (16, 16), (7, 31)])
def test_cells_rows_columns_and_neighbours(out, in_):
    cells, nnz, seeds = out * in_, out * in_ // 5, 1500
    hits, row_variance, pairs = np.zeros((out, in_)), 0.0, 0
    for seed in range(seeds):
        mask = np.zeros(cells)
        mask[flat(out, in_, nnz, seed).numpy()] = 1
        mask = mask.reshape(out, in_)
        hits += mask
        row_variance += ((mask.sum(1) - nnz / out) ** 2).mean()
        pairs += (mask[:, 1:] * mask[:, :-1]).sum()
    share = nnz / cells
    # positions without replacement: a cell's, row's or column's count over the seeds has a hypergeometric variance
    for observed, size in ((hits, 1), (hits.sum(1), in_), (hits.sum(0), out)):
        variance = seeds * size * share * (1 - share) * (cells - size) / (cells - 1)
        chi = ((observed - seeds * size * share) ** 2 / variance).sum()
        assert abs(chi - observed.size) / sqrt(2 * observed.size) < 4.5
    hypergeometric = nnz / out * (1 - 1 / out) * (cells - nnz) / (cells - 1)
    assert row_variance / seeds == pytest.approx(hypergeometric, rel=0.06)
    neighbours = out * (in_ - 1) * share * (nnz - 1) / (cells - 1) * seeds
    assert pairs == pytest.approx(neighbours, rel=5 / sqrt(neighbours))


def deviations(index, out, in_):
    """Statistics of one large support, as standard deviations from what uniform without replacement gives."""
    nnz, cells = len(index), out * in_
    share = nnz / cells
    row, column = index // in_, index % in_

    def counts(number, size):
        """chi-square of counts in equal classes of `size` cells each"""
        observed = np.bincount(number, minlength=cells // size).astype(float)
        variance = size * share * (1 - share) * (cells - size) / (cells - 1)
        chi = ((observed - size * share) ** 2 / variance).sum() * (1 - size / cells)
        return (chi - (observed.size - 1)) / sqrt(2 * (observed.size - 1))

    def pairs(mask, other):
        """how many positions have a neighbour that is one too"""
        observed, places = np.count_nonzero(mask & other), mask.size
        return (observed - places * share * (nnz - 1) / (cells - 1)) / (sqrt(places) * share)

    mask = np.zeros(cells, dtype=bool)
    mask[index] = True
    mask = mask.reshape(out, in_)
    halves = mask.reshape(out, in_ // 2, 2).sum(2)  # aligned pairs of columns: none, one or both
    return {
        "rows": counts(row, in_),
        "columns": counts(column, out),
        "cells of 16 x 16": counts(row // 16 * (in_ // 16) + column // 16, 256),
        "cells of 1 x 64": counts(row * (in_ // 64) + column // 64, 64),
        "parity": (np.count_nonzero((row + column) % 2) - nnz / 2) / sqrt(nnz * (1 - share) / 4),
        "left and right": pairs(mask[:, 1:], mask[:, :-1]),
        "above and below": pairs(mask[1:], mask[:-1]),
        "diagonal": pairs(mask[1:, 1:], mask[:-1, :-1]),
        "a row apart": pairs(mask[2:], mask[:-2]),
        "both of a pair": (np.count_nonzero(halves == 2) - halves.size * share**2) / (sqrt(halves.size) * share),
    }


LARGE = [(1024, 1536, 0.05, 0, "a"), (2048, 512, 0.03, 1, "b"), (512, 2048, 0.2, 2, "c"), (4096, 4096, 0.05, 3, "d")]


@pytest.mark.parametrize("out, in_, density, seed, name", LARGE)
def test_large_supports_look_uniform(out, in_, density, seed, name):
    found = deviations(flat(out, in_, support.nnz_of(density, out, in_), seed, name).numpy(), out, in_)
    assert max(map(abs, found.values())) < 4.5, found


def test_the_statistics_see_what_is_not_uniform():
    """Samplers that only look random, each caught by the statistic that is there for it."""
    out, in_, per_row, random = 512, 1024, 51, np.random.default_rng(0)
    rows = np.arange(out)[:, None]
    stratified = (rows * in_ + random.random((out, in_)).argsort(1)[:, :per_row]).ravel()  # as many in every row
    assert deviations(stratified, out, in_)["rows"] < -10
    width = 16
    jittered = np.arange(0, out * in_, width) + random.integers(0, width, out * in_ // width)  # one in each stretch
    found = deviations(jittered, out, in_)
    assert found["cells of 1 x 64"] < -10 and found["left and right"] < -5
    skewed = np.unique((random.random(30_000) ** 1.3 * out * in_).astype(int))
    assert deviations(skewed, out, in_)["rows"] > 10
    same = (rows * in_ + random.permutation(in_)[:per_row]).ravel()  # the same columns in every row
    found = deviations(same, out, in_)
    assert min(found["columns"], found["above and below"], found["a row apart"]) > 100
    shifted = (rows * in_ + (random.permutation(in_)[:per_row] + rows) % in_).ravel()
    assert deviations(shifted, out, in_)["diagonal"] > 100
    even = random.permutation(np.flatnonzero(np.indices((out, in_)).sum(0).ravel() % 2 == 0))[:20_000]
    assert abs(deviations(even, out, in_)["parity"]) > 100


def test_layers_are_independent():
    """Two layers share as many positions as chance has it, wherever they are shifted."""
    out, in_, nnz = 512, 1024, 26_214
    masks = [np.zeros(out * in_, dtype=bool) for _ in range(3)]
    for mask, (seed, name) in zip(
        masks, [(0, "model.layers.0"), (0, "model.layers.1"), (1, "model.layers.0")], strict=True
    ):
        mask[flat(out, in_, nnz, seed, name).numpy()] = True
    expected = nnz**2 / (out * in_)
    for other in masks[1:]:
        for shift in (0, 1, 7, in_, out * in_ // 2):
            common = np.count_nonzero(masks[0] & np.roll(other, shift))
            assert abs(common - expected) / sqrt(expected) < 4.5


def test_flat_index_there_and_back():
    index = torch.tensor([17, 3, 11, 0])
    rows, columns, permutation = support.from_flat_index(index, 3, 6)
    assert rows.tolist() == [0, 2, 3, 4] and columns.tolist() == [0, 3, 5, 5]
    assert torch.equal(support.to_flat_index(rows, columns, 6), index[permutation])
    assert support.to_flat_index(rows, columns, 6).dtype == torch.int64
    rows, columns, permutation = support.from_flat_index(torch.empty(0, dtype=torch.int64), 3, 6)
    assert support.check(rows, columns, 3, 6) is None and permutation.numel() == 0
    rows, columns, _ = support.from_flat_index(torch.tensor([69999, 70000]), 2, 70000)
    assert columns.dtype == torch.int32 and columns.tolist() == [69999, 0]


@pytest.mark.parametrize("index, says", [([0, 18], "out of range"), ([-1], "out of range"), ([4, 4], "twice")])
def test_bad_flat_index_is_refused(index, says):
    with pytest.raises(UserError, match=says):
        support.from_flat_index(torch.tensor(index), 3, 6)


def test_check_finds_what_is_wrong():
    rows, columns = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([1, 4, 0], dtype=torch.uint16)
    assert support.check(rows, columns, 2, 5) is None
    assert "must lie in" in support.check(rows, columns, 2, 4)
    assert "rise strictly" in support.check(rows, torch.tensor([4, 1, 0], dtype=torch.uint16), 2, 5)
    assert "rise strictly" in support.check(rows, torch.tensor([1, 1, 0], dtype=torch.uint16), 2, 5)
    assert "rise from 0" in support.check(torch.tensor([0, 3, 2], dtype=torch.int32), columns, 2, 5)
    assert "int32" in support.check(rows.long(), columns, 2, 5)
    assert "uint16" in support.check(rows, columns.int(), 2, 5)


def test_checksum_sees_a_moved_position_and_fits_int64():
    rows, columns = support.sample(20, 30, 100, 0, "x", native=False)
    before = support.checksum(rows, columns)
    assert torch.tensor([before], dtype=torch.int64).item() == before
    moved = columns.numpy().copy()
    moved[50] ^= 1
    assert support.checksum(rows, torch.from_numpy(moved)) != before


def test_too_many_positions_are_refused():
    with pytest.raises(UserError, match="do not fit"):
        support.sample(3, 4, 13, 0, "x")


GOLDEN_KEYS = [(9118943294173560906, 9925769674050775070), (10068518127735060635, 12047359936064419679)]
GOLDEN_SMALL = ([0, 2, 5, 6, 9], [0, 4, 1, 2, 4, 4, 2, 3, 4])
GOLDEN_CHECKSUMS = {
    (512, 1376, 0.03, 0, "model.layers.0.mlp.down_proj"): 1329240929842927701,
    (100, 70001, 0.002, 7, "x"): 5725456292555731158,
    (17, 1, 0.5, 9223372036854775807, "schicht.größe"): 1340919288050699093,
}
