import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bounds import close, of_chain
from torch.utils.checkpoint import checkpoint

from sltrain_ds.ops import builder, reference, sltrain_linear, support, workspace
from sltrain_ds.ops.sltrain_linear import MODES

current = {"mode": os.environ.get("TEST_MODE", "compose")}

SHAPES = [  # x's leading shape, in, out, rank, density, bias
    ((5,), 7, 3, 2, 0.3, False),
    ((2, 3), 16, 24, 4, 0.1, True),
    ((), 9, 5, 1, 0.5, True),
    ((2, 1, 3), 33, 17, 5, 0.05, False),
    ((4,), 8, 8, 2, 0.0, True),
    ((0, 3), 8, 6, 2, 0.2, True),
    ((3,), 1, 1, 1, 1.0, False),
]


def make(leading, in_, out, rank, density, bias, dtype=torch.float64, seed=0):
    """(x, A, B, values, bias), then rows, columns and the flat index."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    nnz = support.nnz_of(density, out, in_)
    rows, columns = support.sample(out, in_, nnz, seed, "test")
    leaves = (draw(*leading, in_), draw(rank, in_), draw(out, rank), draw(nnz), draw(out) if bias else None)
    return leaves, (rows, columns), support.to_flat_index(rows, columns, in_)


@pytest.fixture(params=MODES, autouse=True)
def mode(request):
    current["mode"] = request.param
    return request.param


def run(leaves, rows_columns, scaling=1.7):
    x, A, B, values, bias = leaves
    return sltrain_linear.linear(x, A, B, values, *rows_columns, scaling, bias, current["mode"])


def run_reference(leaves, flat, scaling=1.7):
    x, A, B, values, bias = leaves
    return reference.linear(x, A, B, values, flat, scaling, bias)


def gradients(y, leaves):
    g = torch.Generator().manual_seed(99)
    weights = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    leaves = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(y, leaves, weights)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_match_the_reference(shape, dtype):
    leaves, places, flat = make(*shape, dtype=dtype)
    y, expected = run(leaves, places), run_reference(leaves, flat)
    assert y.dtype == expected.dtype and y.shape == expected.shape
    bound = of_chain(dtype, max(*shape[0], *shape[1:3]), 3)  # B A, W x, and a gradient
    close(y, expected, bound)
    for found, wanted in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
        assert found.dtype == wanted.dtype
        close(found, wanted, bound)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(shape):
    leaves, places, _ = make(*shape)
    x, A, B, values, bias = leaves
    inputs = [x, A, B, values] + ([bias] if bias is not None else [])
    assert torch.autograd.gradcheck(lambda *t: run((*t, None)[:5], places), inputs)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_stays_within_one_percent_of_float64(autocast):
    leaves, places, flat = make((64,), 256, 192, 32, 0.05, True, dtype=torch.float32)
    if not autocast:
        leaves = tuple(leaf.detach().bfloat16().requires_grad_() for leaf in leaves)
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(leaves, places)
    assert y.dtype == torch.bfloat16
    expected = run_reference(exact, flat)
    pairs = [(y, expected), *zip(gradients(y, leaves), gradients(expected, exact), strict=True)]
    for (found, wanted), leaf in zip(pairs, (y, *leaves), strict=True):
        assert found.dtype == leaf.dtype
        assert ((found.double() - wanted).norm() / wanted.norm()).item() < 1e-2


def test_autocast_saves_no_casted_parameters(mode):
    leaves, places, _ = make((4,), 16, 8, 2, 0.2, False, dtype=torch.float32)
    saved = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        run(leaves, places)
    _, A, B, values, _ = leaves
    assert {t.data_ptr() for t in saved if t.is_floating_point() and t.dtype == torch.float32} == {
        t.data_ptr() for t in (A, B, values)
    }
    shapes = {"keep": [(8, 16)], "compose": []}.get(mode, [(4, 2)])
    assert [t.shape for t in saved if t.dtype == torch.bfloat16] == [(4, 16), *shapes]


def test_saved_for_backward_are_x_the_parameters_and_what_the_mode_keeps(mode):
    leaves, places, _ = make((4,), 16, 8, 2, 0.2, True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(leaves, places)
    x, A, B, values, _ = leaves
    own = {t.data_ptr() for t in (x, A, B, values)}
    assert own <= {t.data_ptr() for t in saved}
    kept = [tuple(t.shape) for t in saved if t.data_ptr() not in own]
    assert kept == {"keep": [(8, 16)], "compose": []}.get(mode, [(4, 2)])


@pytest.mark.parametrize("kind", ["transposed", "strided", "expanded"])
def test_non_contiguous_input_and_gradient(kind):
    leaves, places, flat = make((6, 5), 12, 10, 3, 0.2, True)
    x, *rest = leaves
    base = x.detach()
    if kind == "transposed":
        base = base.transpose(0, 1)
    elif kind == "strided":
        base = torch.cat([base, base], -1)[..., ::2]
    else:
        base = base[:1].expand(6, 5, 12)
    x = base.requires_grad_()
    y, expected = run((x, *rest), places), run_reference((x, *rest), flat)
    torch.testing.assert_close(y, expected)
    dy = torch.randn(y.shape[::-1], dtype=y.dtype).permute(2, 1, 0)  # not contiguous either
    for found, wanted in zip(
        torch.autograd.grad(y, (x, *rest), dy), torch.autograd.grad(expected, (x, *rest), dy), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (1, 3), ()])
def test_only_asked_gradients_are_made(wanted):
    leaves, places, flat = make((5,), 8, 6, 2, 0.3, True)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    y = run(leaves, places)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.sum().backward()
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        run_reference(leaves, flat).sum().backward()
        for i, leaf in enumerate(leaves):
            assert (found[i] is not None) == (i in wanted)
            if i in wanted:
                torch.testing.assert_close(found[i], leaf.grad)


def test_layers_share_one_workspace(mode):
    def held(*shapes):
        workspace.release()
        for in_, out in shapes:
            leaves, places, _ = make((3,), in_, out, 2, 0.2, False)
            run(leaves, places).sum().backward()
        return workspace.nbytes()

    assert held((8, 6), (30, 20), (5, 9)) == held((30, 20)) > 0  # the largest layer's alone
    if mode != "factored" or not builder.load():
        assert held((30, 20)) == 30 * 20 * 8  # W, or S
    workspace.release()
    assert workspace.nbytes() == 0


def test_double_backward_is_refused():
    leaves, places, _ = make((3,), 6, 5, 2, 0.3, False)
    (dx,) = torch.autograd.grad(run(leaves, places).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        dx.sum().backward()


def test_mixed_dtypes_are_refused():
    leaves, places, _ = make((3,), 6, 5, 2, 0.3, False)
    with pytest.raises(RuntimeError, match=r"same dtype.*float32.*float64"):
        run((leaves[0].float(), *leaves[1:]), places)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_opcheck(shape, mode):
    (x, A, B, values, bias), places, _ = make(*shape, dtype=torch.float32)
    arguments = (x, A, B, values, *places, bias, 0.5, mode)
    torch.library.opcheck(torch.ops.sltrain.linear, arguments)
    dy = torch.randn(*x.shape[:-1], B.shape[0])
    plain = [t.detach() for t in (x, A, B, values)]
    kept = torch.ops.sltrain.linear(*arguments)[1].detach()
    for needs in ((True,) * 5, (False, True, False, True, False)):
        torch.library.opcheck(torch.ops.sltrain.linear_backward, (dy, *plain, *places, kept, 0.5, mode, *needs))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    leaves, places, _ = make((4,), 10, 10, 3, 0.2, True)

    def block(x):
        return torch.tanh(run((torch.tanh(run((x, *leaves[1:]), places)), *leaves[1:]), places))

    plain = gradients(block(leaves[0]), leaves)
    weights = torch.randn((4, 10), generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    checkpoint(block, leaves[0], use_reentrant=reentrant).backward(weights)
    for leaf, wanted in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, wanted)


def test_compile_fullgraph_forward_and_backward():
    leaves, places, _ = make((4,), 10, 6, 3, 0.2, True, dtype=torch.float32)
    compiled = torch.compile(lambda *t: torch.relu(run(t, places)), fullgraph=True, backend="aot_eager", dynamic=False)
    y, expected = compiled(*leaves), torch.relu(run(leaves, places))
    assert torch.equal(y, expected)
    for found, wanted in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
        assert torch.equal(found, wanted)


def test_python_reference_serves_the_same(tmp_path, mode):
    # a process without the C++ ops, told so by the environment, against this one
    path = tmp_path / "out.pt"
    code = f"""
import torch
import sys
sys.path += ['tests', 'tests/ops']
from test_sltrain_linear import make, run, gradients
for dtype in (torch.float32, torch.bfloat16):
    leaves, places, _ = make((6,), 40, 30, 4, 0.1, True, dtype=dtype)
    y = run(leaves, places)
    torch.save([y.detach(), *gradients(y, leaves)], {str(path)!r} + str(dtype))
"""
    env = {**os.environ, "SLTRAIN_OPS": "reference", "TEST_MODE": mode}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.count("the PyTorch reference serves in place of the C++ ops: SLTRAIN_OPS=reference") == 1
    for dtype in (torch.float32, torch.bfloat16):
        leaves, places, _ = make((6,), 40, 30, 4, 0.1, True, dtype=dtype)
        y = run(leaves, places)
        expected = torch.load(f"{path}{dtype}", weights_only=True)
        for found, wanted in zip((y, *gradients(y, leaves)), expected, strict=True):
            error = (found - wanted).float().norm() / wanted.float().norm()
            assert found.dtype == dtype and error.item() < 8 * torch.finfo(dtype).eps
