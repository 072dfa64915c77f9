"""Layers drawn at random, in every mode, against float64: output and each gradient, from poisoned scratch."""

import random

import pytest
import torch

from sltrain_ds.ops import reference, sltrain_linear, support, workspace
from sltrain_ds.ops.sltrain_linear import MODES

LAYOUTS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "padded": lambda x: torch.nn.functional.pad(x, (0, 3))[:, :-3],
    "batched": lambda x: x.view(1, *x.shape),
}


def draw(case: int) -> dict:
    g = random.Random(case)
    dtype = g.choice([torch.float32, torch.bfloat16])
    least = 2  # a single number may cancel to less than its parts' rounding
    in_, out = (g.choice([least, 7, 16, 33, 64, 130, 260, 515]) for _ in range(2))
    return {
        "sizes": (
            in_,
            out,
            g.randint(least, max(least, min(in_, out, 40))),
            g.choice([1, 3, 15, 64, 65, 200, 300, 520]),
        ),
        "density": g.choice([0.0, 0.01, 0.03, 0.05, 0.3, 1.0]),
        "dtype": dtype,
        "mode": MODES[case % len(MODES)],
        "layout": g.choice(list(LAYOUTS)),
        "bias": g.random() < 0.3,
        "scaling": g.choice([0.25, 1.0, 2.0]),
    }


def poison():
    for buffer in workspace.buffers():
        buffer.fill_(float("nan"))


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned():
    """Every torch.empty, of Python and of the kernels, comes full of NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def run(x, dy, A, B, values, bias, places, scaling, mode):
    poison()
    leaves = [t for t in (x, A, B, values, bias) if t is not None]
    y = sltrain_linear.linear(x, A, B, values, *places, scaling, bias, mode)
    poison()
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_random_layers(first, threads):
    for number in range(first, first + 25):
        case = draw(number)
        in_, out, rank, tokens = case["sizes"]
        dtype, layout = case["dtype"], LAYOUTS[case["layout"]]
        g = torch.Generator().manual_seed(number)

        def leaf(*shape, g=g, dtype=dtype, scale=1.0):
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

        nnz = support.nnz_of(case["density"], out, in_)
        places = support.sample(out, in_, nnz, number, "random")
        A, B, values = leaf(rank, in_), leaf(out, rank, scale=rank**-0.5), leaf(nnz)
        bias = leaf(out) if case["bias"] else None
        x, dy = layout(leaf(tokens, in_)), layout(leaf(tokens, out))
        arguments = [t if t is None else t.detach().requires_grad_() for t in (A, B, values, bias)]
        results = []
        for count in (1, 2):
            threads(count)
            results.append(run(x.detach().requires_grad_(), dy, *arguments, places, case["scaling"], case["mode"]))
        exact = [t if t is None else t.detach().double().requires_grad_() for t in (x, *arguments)]
        flat = support.to_flat_index(*places, in_)
        y = reference.linear(exact[0], *exact[1:4], flat, case["scaling"], exact[4])
        expected = [y, *torch.autograd.grad(y, [t for t in exact if t is not None], dy.double())]
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        for one, two, wanted in zip(*results, expected, strict=True):
            assert one.dtype == dtype and one.shape == wanted.shape
            assert torch.equal(one, two), f"1 and 2 threads differ: {number} {case}"
            error = (one.double() - wanted).norm().item()
            assert error <= bound * wanted.norm().item(), f"{error / wanted.norm().item()}: {number} {case}"
