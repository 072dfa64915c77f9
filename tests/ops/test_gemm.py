"""The dense products of the operator against float64: layouts, edges of tiles, deep sums, threads."""

import itertools

import pytest
import torch
from bounds import check_sums

from sltrain_ds.ops.gemm import gemm_


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _matrix(rows, columns, by_columns, dtype):
    return (torch.randn(columns, rows).t() if by_columns else torch.randn(rows, columns)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 31, 32, 65, 2049, 4200])
def test_products_are_right_on_any_layout_and_edge(dtype, k):
    torch.manual_seed(k)
    for m, n, a_by_columns, b_by_columns in itertools.product(
        (1, 5, 33, 100), (1, 32, 72), (False, True), (False, True)
    ):
        a, b = _matrix(m, k, a_by_columns, dtype), _matrix(k, n, b_by_columns, dtype)
        kind = (m + n + k) % 3  # plain, added to, with a bias
        before = torch.randn(m, n).to(dtype) if kind == 1 else torch.full((m, n), float("nan")).to(dtype)
        bias = torch.randn(n).to(dtype) if kind == 2 else None
        expected = 0.5 * (a.double() @ b.double())
        expected += before.double() if kind == 1 else 0 if bias is None else bias.double()
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(gemm_(before.clone(), a, b, 0.5, bias, kind == 1))
        assert torch.equal(*found), "the number of threads changed bits"
        sizes = 0.5 * (a.double().abs() @ b.double().abs()) + (before.double().abs() if kind == 1 else 0)
        check_sums(found[0], expected, sizes + (bias.double().abs() if kind == 2 else 0))


def test_a_nan_stays_one_and_stays_in_its_row():
    a, b = torch.ones(64, 64).bfloat16(), torch.ones(64, 64).bfloat16()
    a[3, 5] = float("nan")
    out = gemm_(torch.empty(64, 64).bfloat16(), a, b)
    assert out[3].isnan().all() and out.isnan().sum() == 64


@pytest.mark.parametrize("by_columns", [False, True])
def test_strides_of_a_wider_matrix(by_columns):
    wide = torch.randn(96, 80).bfloat16()
    a = (wide.t() if by_columns else wide)[3:67, 1:66]
    b, out = torch.randn(70, 90).bfloat16()[2:67, 7:47], torch.zeros(70, 50).bfloat16()
    gemm_(out[1:65, 2:42], a, b)
    expected = a.double() @ b.double()
    check_sums(out[1:65, 2:42], expected, a.double().abs() @ b.double().abs())
    out[1:65, 2:42] = 0
    assert not out.any(), "wrote outside"
