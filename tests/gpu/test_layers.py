"""The layer on a GPU: every mode against the reference in float64, and that the kernels are what serves it."""

import pytest
import torch

from sltrain_ds.ops import cuda, measure_modes, modes, reference, sltrain_linear, sparse, support

SHAPES = [(64, 512, 512, 128, 0.03), (257, 130, 515, 7, 0.3), (33, 4096, 1024, 64, 0.05), (1, 7, 3, 2, 0.0)]


@pytest.mark.parametrize("tokens, in_, out, rank, density", SHAPES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2 * torch.finfo(torch.bfloat16).eps)])
@pytest.mark.parametrize("mode", modes.MODES)
def test_outputs_and_gradients(monkeypatch, tokens, in_, out, rank, density, dtype, bound, mode):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    rows, columns = support.sample(out, in_, support.nnz_of(density, out, in_), 3, "x")
    flat = support.to_flat_index(rows, columns, in_).cuda()
    g = torch.Generator().manual_seed(0)
    shapes = [(tokens, in_), (rank, in_), (out, rank), (columns.numel(),), (out,)]
    scales = [1, 1, rank**-0.5, 1, 1]
    leaves = [(torch.randn(s, generator=g) * k).to("cuda", dtype) for s, k in zip(shapes, scales, strict=True)]
    x, A, B, values, bias = leaves = [leaf.requires_grad_() for leaf in leaves]
    dy = torch.randn(tokens, out, generator=g).to("cuda", dtype)
    y = sltrain_linear.linear(x, A, B, values, rows.cuda(), columns.cuda(), 0.5, bias, mode)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = reference.linear(*exact[:4], flat, 0.5, exact[4])
    found = [y, *torch.autograd.grad(y, leaves, dy)]
    wanted = [expected, *torch.autograd.grad(expected, exact, dy.double())]
    # the same sums without their signs: where terms cancel, the error keeps the size that they have together
    positive = [leaf.detach().abs().requires_grad_() for leaf in exact]
    unsigned = reference.linear(*positive[:4], flat, 0.5, positive[4])
    sizes = [unsigned, *torch.autograd.grad(unsigned, positive, dy.double().abs())]
    for one, other, size in zip(found, wanted, sizes, strict=True):
        assert one.dtype == dtype
        together = size.norm() / max(tokens, in_, out) ** 0.5  # of terms of random sign
        assert (one.double() - other).norm() <= bound * torch.maximum(other.norm(), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_moves_go_through_the_kernels(kernels, monkeypatch, dtype):
    called = []
    for name in ("scatter_add_", "gather"):
        kernel = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *args, name=name, kernel=kernel: (called.append(name), kernel(*args)))
    rows, columns = support.sample(300, 257, 4000, 0, "x")
    index = support.to_flat_index(rows, columns, 257).cuda()
    rows, columns = rows.cuda(), columns.cuda()
    values, W = torch.randn(4000, device="cuda", dtype=dtype), torch.zeros(300, 257, device="cuda", dtype=dtype)
    sparse.scatter_add_(W, rows, columns, values)
    assert torch.equal(W.double(), reference.dense_sparse(values.double(), index, (300, 257)))
    out = torch.empty_like(values)
    sparse.gather(W, rows, columns, out=out)
    assert torch.equal(out, values) and called == ["scatter_add_", "gather"]


def test_other_dtypes_are_pytorchs():
    rows, columns = support.sample(30, 25, 100, 0, "x")
    W, values = torch.zeros(30, 25, device="cuda", dtype=torch.float64), torch.ones(100, device="cuda")
    sparse.scatter_add_(W, rows.cuda(), columns.cuda(), values.double())
    assert float(W.sum()) == 100


def test_the_modes_are_measured_on_the_gpu():
    names = measure_modes.candidates("cuda", keep=True, held=True)
    layer = measure_modes.Layer(192, 96, 8, 1843, 256, torch.bfloat16, "cuda")
    found = measure_modes.measure(layer, names)
    assert set(found) == {"compose", "factored_dense", "keep", "held"} and min(found.values()) > 0
