import numpy as np
import pytest
import torch
from bounds import of_chain

from sltrain_ds.report.spectra import analyse, choose, coarse
from sltrain_ds.report.weights import Layer


def layer(out=24, inn=40, rank=3):
    rng = np.random.default_rng(0)
    low = rng.normal(size=(out, rank)) @ rng.normal(size=(rank, inn))
    sparse = np.where(rng.random((out, inn)) < 0.1, rng.normal(size=(out, inn)), 0)
    low, sparse = low.astype(np.float32), sparse.astype(np.float32)
    return Layer("model.layers.0.mlp.up_proj", low + sparse, low, sparse)


def test_parts_add_up_to_the_singular_values():
    found = analyse(layer(), 3)
    expected = np.linalg.svd(layer().W, compute_uv=False)
    bound = of_chain(torch.float32, 40, 3) * expected[0]  # W, its singular values, and U^T (part) V
    np.testing.assert_allclose(found.low_rank + found.sparse, found.singular, rtol=0.0, atol=bound)
    np.testing.assert_allclose(found.singular, expected, rtol=0.0, atol=bound)
    assert found.tail_from_sparse > 0.8  # a rank-3 part has little to give beyond r = 3


def test_residual_is_what_the_best_rank_r_leaves():
    W = layer().W
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    expected = np.abs(W - (U[:, :5] * s[:5]) @ Vt[:5])
    found = analyse(layer(), 5)
    np.testing.assert_allclose(found.residual_map, expected, rtol=0.0, atol=of_chain(torch.float32, 40, 2) * s[0])
    assert found.cell == (1, 1)
    assert (np.abs(expected) < found.quantile(0.9)).mean() == pytest.approx(0.9, abs=0.01)
    assert found.magnitudes[-1] == pytest.approx(expected.max(), rel=1e-4)


def test_a_low_rank_matrix_leaves_nothing():
    low = layer().low_rank
    found = analyse(Layer("w", low, low, None), 3)
    assert found.magnitudes.max() < 1e-5 and found.sparse is None and found.tail_from_sparse is None


def test_rank_has_a_default_and_a_limit():
    dense = Layer("w", layer().W, None, None)
    assert analyse(dense).rank == 6 and analyse(dense, 1000).rank == 24
    assert analyse(dense).low_rank is None


def test_cells_are_means():
    values = np.arange(35.0).reshape(5, 7)
    found = coarse(values, (2, 3))
    assert found.shape == (3, 3)
    assert found[0, 0] == values[:2, :3].mean() and found[2, 2] == values[4, 6]
    np.testing.assert_array_equal(coarse(values, (1, 1)), values)


SHAPES = {
    f"model.layers.{i}.{name}": (64, 64)
    for i in range(4)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
}


def test_choice_by_pattern_and_by_budget():
    assert choose(SHAPES, ["all"], 0) == list(SHAPES)
    assert choose(SHAPES, ["layers.1"], 0) == [name for name in SHAPES if ".1." in name]
    assert len(choose(SHAPES, ["q_proj"], 0)) == 4 and not choose(SHAPES, ["proj"], 1e12)
    assert choose(SHAPES, [], 1e12) == list(SHAPES)
    two = choose(SHAPES, [], 1)
    assert [name.split(".")[-2] for name in two] == ["self_attn", "mlp"]  # one of each, however dear
    some = choose(SHAPES, [], 7 * 64**3)
    assert len(some) == 7 and {name.split(".")[2] for name in some} == {"0", "2", "3"}
