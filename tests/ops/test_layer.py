"""csrc/layer.cpp against the same pass in Python, bit for bit: both call the same products in the same order."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sltrain_ds.ops import builder, gemm, sltrain_linear, support
from sltrain_ds.ops.sltrain_linear import MODES

pytestmark = pytest.mark.skipif(not builder.load(), reason="needs the C++ ops")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
IN, OUT, RANK, TOKENS = 40, 24, 6, (3, 5)


def draw(bias=True, dtype=torch.float32, of_x=None):
    """(x, A, B, values, bias), rows and columns; `of_x`: another dtype for x."""
    g = torch.Generator().manual_seed(0)
    rows, columns = support.sample(OUT, IN, 100, 0, "layer")
    sizes = ((*TOKENS, IN), (RANK, IN), (OUT, RANK), (100,), (OUT,))[: 4 + bias]
    x, *parameters = (torch.randn(*size, generator=g).to(dtype).requires_grad_() for size in sizes)
    x = x.detach().to(of_x or dtype).requires_grad_()
    return [x, *parameters, *[None] * (not bias)], rows, columns


def both(leaves, rows, columns, mode, dy=None):
    """((y, gradients) of the C++ pass, the same of the Python one)"""
    x, A, B, values, bias = leaves
    arguments = (x, A, B, values, rows, columns, bias, 1.7)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    outputs = (
        torch.ops.sltrain.layer(*arguments, MODES.index(mode)),
        sltrain_linear._Eager.apply(*arguments, mode)[0],
    )
    if dy is None:
        dy = torch.randn(*TOKENS, OUT, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    return [(y, torch.autograd.grad(y, wanted, dy, allow_unused=True)) for y in outputs]


def same(first, second):
    (y, grads), (y_too, grads_too) = first, second
    assert torch.equal(y, y_too) and y.dtype == y_too.dtype and y.stride() == y_too.stride()
    for grad, grad_too in zip(grads, grads_too, strict=True):
        assert torch.equal(grad, grad_too) and grad.dtype == grad_too.dtype and grad.stride() == grad_too.stride()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_same_bits(mode, dtype, bias):
    same(*both(*draw(bias, dtype), mode))


@pytest.mark.parametrize("mode", MODES)
def test_same_gradients_whichever_are_wanted(mode):
    for wanted in itertools.product((False, True), repeat=5):
        if any(wanted):
            leaves, rows, columns = draw()
            for leaf, want in zip(leaves, wanted, strict=True):
                leaf.requires_grad_(want)
            same(*both(leaves, rows, columns, mode))


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_from_strided_x_and_dy(mode):
    leaves, rows, columns = draw()
    leaves[0] = torch.randn(TOKENS[1], TOKENS[0], IN, generator=torch.Generator().manual_seed(2)).transpose(0, 1)
    leaves[0].requires_grad_()
    same(*both(leaves, rows, columns, mode, torch.ones(1).expand(*TOKENS, OUT)))


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_where_parameters_are_wider_than_x(mode):
    same(*both(*draw(dtype=torch.float32, of_x=torch.bfloat16), mode))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_is_the_same_but_for_the_support_which_no_hook_sees(mode):
    leaves, rows, columns = draw()
    arguments = (*leaves[:4], rows, columns, leaves[4], 1.7)

    def saved(call):
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
            y = call()
        y.sum().backward()
        return sorted((tuple(t.shape), str(t.dtype)) for t in packed)

    support = [(tuple(t.shape), str(t.dtype)) for t in (rows, columns)]
    found = saved(lambda: torch.ops.sltrain.layer(*arguments, MODES.index(mode)))
    assert sorted(found + support) == saved(lambda: sltrain_linear._Eager.apply(*arguments, mode)[0])


def test_a_layer_takes_this_way_unless_somebody_looks_on(monkeypatch):
    leaves, rows, columns = draw(bias=False)

    def is_native():
        x, A, B, values, _ = leaves
        kind = type(sltrain_linear.linear(x, A, B, values, rows, columns, 1.7).grad_fn)
        return not issubclass(kind, torch.autograd.function.BackwardCFunction)

    assert is_native()
    with FlopCounterMode(display=False):
        assert not is_native()
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: gemm._addmm(*a, **k))  # as DeepSpeed's flops profiler does
    assert not is_native()


def test_what_does_not_fit_is_refused():
    (x, A, B, values, _), rows, columns = draw(bias=False)
    with pytest.raises(RuntimeError, match="features"):
        torch.ops.sltrain.layer(x[..., 1:], A, B, values, rows, columns, None, 1.0, 0)
    with pytest.raises(RuntimeError, match="mode"):
        torch.ops.sltrain.layer(x, A, B, values, rows, columns, None, 1.0, 4)
