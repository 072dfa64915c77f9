import pytest
import torch

from sltrain_ds.ops import builder, reference, sparse, support

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1.0), (7, 33, 0.2), (300, 257, 0.05), (5, 4, 0.0), (3, 70000, 0.001)]


@pytest.fixture(params=["native", "reference"])
def path(request, monkeypatch):
    if request.param == "native" and not builder.load():
        pytest.skip(f"no C++ ops: {builder.status()[1]}")
    if request.param == "reference":
        monkeypatch.setattr(builder, "_state", ("reference", "test"))


def make(out, in_, density, weight_dtype, value_dtype):
    g = torch.Generator().manual_seed(0)
    nnz = support.nnz_of(density, out, in_)
    rows, columns = support.sample(out, in_, nnz, 0, "x")
    W = torch.randn(out, in_, generator=g, dtype=torch.float64).to(weight_dtype)
    return W, rows, columns, torch.randn(nnz, generator=g, dtype=torch.float64).to(value_dtype)


@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("value_dtype", FLOATS)
@pytest.mark.parametrize("out, in_, density", SHAPES)
def test_scatter_and_gather_round_once(path, out, in_, density, weight_dtype, value_dtype):
    W, rows, columns, values = make(out, in_, density, weight_dtype, value_dtype)
    index = support.to_flat_index(rows, columns, in_)
    wide = torch.float64 if torch.float64 in (weight_dtype, value_dtype) else torch.float32
    expected = W.to(wide) + reference.dense_sparse(values.to(wide), index, (out, in_))
    before = W.clone()
    sparse.scatter_add_(W, rows, columns, values)
    assert torch.equal(W, expected.to(weight_dtype))
    untouched = torch.ones(out * in_, dtype=torch.bool).index_fill(0, index, False).view(out, in_)
    assert torch.equal(W[untouched], before[untouched])
    taken = torch.empty_like(values)
    sparse.gather(before, rows, columns, out=taken)
    assert torch.equal(taken, before.view(-1)[index].to(value_dtype))


def test_bits_do_not_depend_on_the_thread_count():
    if not builder.load():
        pytest.skip(f"no C++ ops: {builder.status()[1]}")
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        W, rows, columns, values = make(500, 400, 0.2, torch.bfloat16, torch.float32)
        sparse.scatter_add_(W, rows, columns, values)
        taken = torch.empty(values.numel())
        sparse.gather(W, rows, columns, out=taken)
        results.append((W, taken))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])


def test_shapes_that_do_not_fit_are_refused_by_the_kernels():
    if not builder.load():
        pytest.skip(f"no C++ ops: {builder.status()[1]}")
    W, rows, columns, values = make(7, 33, 0.2, torch.float32, torch.float32)
    for bad in ((W.t(), rows, columns, values), (W, rows[1:], columns, values), (W, rows, columns, values[1:])):
        with pytest.raises(RuntimeError):
            sparse.scatter_add_(*bad)
    with pytest.raises(RuntimeError):
        sparse.scatter_add_(W, rows.long(), columns, values)
