import copy
import math

import pytest
import torch
from torch import nn

from sltrain_ds import SLTrainConfig, SLTrainLinear
from sltrain_ds.errors import UserError
from sltrain_ds.ops import reference, support


def layer(in_=20, out=12, *, name="model.layers.0.mlp.up_proj", seed=0, **kwargs):
    options = {"rank": 3, "density": 0.1, "alpha": 6, "layer_name": name, "support_seed": seed, **kwargs}
    return SLTrainLinear(in_, out, **options)


def trained(*args, **kwargs):
    made = layer(*args, **kwargs)
    with torch.no_grad():
        made.B.normal_()
        if made.bias is not None:
            made.bias.normal_()
    return made


def flat_index(made):
    return support.to_flat_index(made.S_rows, made.S_columns, made.in_features)


def expected_support(made):
    return support.sample(made.out_features, made.in_features, made.nnz, made.support_seed, made.layer_name)


def holds_its_support(made):
    return all(
        torch.equal(a.int(), b.int())
        for a, b in zip((made.S_rows, made.S_columns), expected_support(made), strict=True)
    )


def test_attributes_shapes_and_dtypes():
    made = layer(40, 30, rank=5, density=0.07, alpha=2.5, bias=True)
    assert made.A.shape == (5, 40) and made.B.shape == (30, 5) and made.bias.shape == (30,)
    assert made.nnz == int(0.07 * 30 * 40) == made.S_values.numel()
    made.ensure_support()
    assert made.S_rows.dtype == torch.int32 and made.S_rows.shape == (31,)
    assert made.S_columns.dtype == torch.uint16 and made.S_columns.shape == (made.nnz,)
    assert made.scaling == 2.5 / 5
    assert set(dict(made.named_parameters())) == {"A", "B", "S_values", "bias"}
    assert set(made.state_dict()) == {"A", "B", "S_values", "bias"}
    assert made.roles == {"A": "factors", "B": "factors", "S_values": "sparse"}
    assert layer().bias is None
    assert layer(3, 70000, rank=1, density=0.0001).S_columns.dtype == torch.uint16
    assert layer(70000, 3, rank=1, density=0.0001).S_columns.dtype == torch.int32


def test_initial_values_are_the_papers():
    made = layer(400, 300, rank=100, density=0.1, bias=True)
    bound = 1 / math.sqrt(400)
    assert not made.B.any() and not made.bias.any()
    for values in (made.A, made.S_values):
        assert values.abs().max() <= bound and values.abs().max() > 0.98 * bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert abs(values.mean().item()) < 0.03 * bound


def test_reset_uses_the_generator_alone_whatever_the_dtype():
    drawn = []
    for dtype, noise in ((torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 3), (torch.float64, 4)):
        torch.manual_seed(noise)
        made = layer(dtype=dtype)
        made.reset_parameters(torch.Generator().manual_seed(5))
        drawn.append((made.A.detach(), made.S_values.detach()))
    for other, dtype in zip(drawn[1:], (torch.float32, torch.bfloat16, torch.float64), strict=True):
        assert all(torch.equal(a.to(dtype), b) for a, b in zip(drawn[0], other, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.13, 1.0])
def test_forward_and_weights_match_the_reference(bias, density):
    made = trained(bias=bias, density=density, dtype=torch.float64)
    x = torch.randn(2, 5, 20, dtype=torch.float64, requires_grad=True)
    y = made(x)
    arguments = (made.A, made.B, made.S_values, flat_index(made), made.scaling)
    expected = reference.linear(x, *arguments, made.bias)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(made.dense_weight(), reference.dense_weight(*arguments).detach())
    S = reference.dense_sparse(made.S_values, flat_index(made), (12, 20)).detach()
    assert torch.equal(made.dense_sparse(), S) and int((S != 0).sum()) == made.nnz
    assert not made.dense_weight().requires_grad and not made.dense_sparse().requires_grad
    dy = torch.randn_like(y)
    leaves = [x, *made.parameters()]
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_same_support_for_same_name_and_seed_only():
    one = layer().support_info()
    assert one == layer().support_info()
    assert one["kind"] == "generated" and one["nnz"] == 24 and one["generator_version"] == support.GENERATOR_VERSION
    assert one["checksum"] == support.checksum(*expected_support(layer()))
    assert layer(name="other").support_info()["checksum"] != one["checksum"]
    assert layer(seed=1).support_info()["checksum"] != one["checksum"]


@pytest.mark.parametrize("bad", ["from construction on meta", "after a forward"])
def test_to_empty_leaves_garbage_that_is_made_good(bad):
    made = layer(device="meta") if "meta" in bad else layer()
    if "meta" not in bad:
        made(torch.randn(3, 20))
    made.to_empty(device="cpu")
    if "meta" in bad:
        made.S_rows.fill_(-7)  # what an allocator may well leave there
        made.S_columns.view(torch.int16).fill_(-1)
    made.reset_parameters(torch.Generator().manual_seed(0))
    assert made(torch.randn(3, 20)).isfinite().all()
    assert holds_its_support(made)


def test_a_replaced_buffer_is_noticed():
    made = layer()
    x = torch.randn(3, 20)
    y = made(x)
    made.S_columns = torch.zeros_like(made.S_columns)  # as transformers does in from_pretrained
    assert torch.equal(made(x), y) and holds_its_support(made)


def test_to_and_casts_keep_the_support_and_its_dtypes():
    made = layer()
    made(torch.randn(3, 20))
    columns = made.S_columns
    made = made.bfloat16()
    assert made.S_columns is columns and made.S_rows.dtype == torch.int32 and made.A.dtype == torch.bfloat16
    assert made(torch.randn(3, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16
    made = made.to(torch.float32).to("cpu")
    assert holds_its_support(made)


def test_a_meta_layer_runs_and_comes_back():
    made = layer(bias=True, device="meta", dtype=torch.bfloat16)
    assert made(torch.empty(2, 3, 20, device="meta", dtype=torch.bfloat16)).shape == (2, 3, 12)
    assert made.nnz == 24
    made.to_empty(device="cpu")
    assert made.support_info()["checksum"] == layer().support_info()["checksum"]


def test_deepcopy_and_state_dict():
    made = trained()
    made(torch.randn(3, 20))
    other = copy.deepcopy(made)
    x = torch.randn(3, 20)
    assert torch.equal(made(x), other(x)) and other.S_columns is not made.S_columns
    fresh = layer()
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(x), made(x))


def stored():
    made = trained()
    index = torch.randperm(240, generator=torch.Generator().manual_seed(1))[: made.nnz]
    rows, columns, _ = support.from_flat_index(index, 12, 20)
    made.set_stored_support(rows, columns)
    return made, index.sort().values


def test_stored_support_is_used_and_saved():
    made, index = stored()
    x = torch.randn(4, 20)
    expected = reference.linear(x, made.A, made.B, made.S_values, index, made.scaling)
    torch.testing.assert_close(made(x), expected)
    info = made.support_info()
    assert info["kind"] == "stored" and info["checksum"] == support.checksum(made.S_rows, made.S_columns)
    state = made.state_dict()
    assert {"S_rows", "S_columns"} < set(state)
    for target in (
        layer(),
        layer(device="meta").to_empty(device="cpu"),
    ):  # a plain layer takes a stored support from a state dict
        target.load_state_dict(state)
        torch.testing.assert_close(target(x), expected)
        assert target.support_info() == info
        assert {"S_rows", "S_columns"} < set(target.state_dict())
    made.to_empty(device="cpu")
    made.load_state_dict(state)
    torch.testing.assert_close(made(x), expected)


def test_stored_support_that_was_lost_is_an_error_not_a_draw():
    made, _ = stored()
    made.S_rows.fill_(3)
    made.S_rows = made.S_rows.clone()
    with pytest.raises(UserError, match=r"stored support of model\.layers\.0\.mlp\.up_proj"):
        made(torch.randn(1, 20))


def test_another_stored_support_in_its_place_is_noticed():
    made, _ = stored()
    made(torch.randn(1, 20))
    rows, columns, _ = support.from_flat_index(torch.arange(24) * 7, 12, 20)
    made.S_rows, made.S_columns = rows, columns
    with pytest.raises(UserError, match="not the one that was given"):
        made(torch.randn(1, 20))


def test_unusable_stored_supports_are_refused():
    made = layer()
    rows, columns = (t.clone() for t in (made.S_rows, made.S_columns))
    made.ensure_support()
    with pytest.raises(UserError, match=r"positions for 24 values|rise"):
        made.set_stored_support(rows.zero_(), columns[:0])
    short = support.from_flat_index(torch.arange(10), 12, 20)
    with pytest.raises(UserError, match="10 positions for 24 values"):
        made.set_stored_support(*short[:2])
    far = torch.tensor([0] + [24] * 12), torch.arange(24) + 65536  # would wrap around in uint16
    with pytest.raises(UserError, match="below 20"):
        made.set_stored_support(*far)
    assert made.support_info()["kind"] == "generated"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_from_a_garbage_support_and_again_after_to_empty(backend):
    torch._dynamo.reset()
    made = layer(device="meta").to_empty(device="cpu")
    made.S_columns.view(torch.int16).fill_(-1)
    made.reset_parameters(torch.Generator().manual_seed(0))
    nn.init.normal_(made.B)
    state, x = copy.deepcopy(made.state_dict()), torch.randn(4, 20, requires_grad=True)
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    y = compiled(x)
    y.sum().backward()
    assert holds_its_support(made)
    eager = layer()
    eager.load_state_dict(state)
    x2 = x.detach().requires_grad_()
    eager(x2).sum().backward()
    torch.testing.assert_close(y, eager(x2))
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(made.S_values.grad, eager.S_values.grad)
    made.to_empty(device="cpu")
    made.load_state_dict(state)
    torch.testing.assert_close(compiled(x), y)


def test_flops_per_token_is_the_dense_layers():
    assert layer().flops_per_token() == 2 * 20 * 12


@pytest.mark.parametrize(
    "change, says",
    [
        ({"rank": 0}, "rank = 0 must be at least 1"),
        ({"rank": 2.5}, "rank must be an integer"),
        ({"rank": True}, "rank must be an integer"),
        ({"rank": 13}, r"rank = 13 exceeds min\(in, out\) = 12 of model\.layers\.0\.mlp\.up_proj"),
        ({"density": 1.5}, "density = 1.5 must be at least 0 and at most 1"),
        ({"density": -0.1}, "density = -0.1"),
        ({"density": "0.1"}, "density must be a number"),
        ({"alpha": 0}, "alpha = 0 must be above 0"),
        ({"alpha": math.nan}, "alpha must be a number"),
        ({"support_seed": -1}, "support_seed = -1"),
    ],
)
def test_bad_arguments_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        layer(**({"seed": change["support_seed"]} if "support_seed" in change else change))
    if change != {"rank": 13}:
        with pytest.raises(UserError, match=says):
            SLTrainConfig(**{"rank": 3, "density": 0.1, "alpha": 6, **change})
