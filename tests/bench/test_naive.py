import pytest
import torch

from sltrain_ds.bench import naive
from sltrain_ds.methods.sltrain_layer import SLTrainLinear
from sltrain_ds.ops import reference, support


@pytest.fixture
def layer():
    layer = SLTrainLinear(24, 17, rank=5, density=0.1, alpha=3, bias=True, dtype=torch.float64)
    torch.nn.init.normal_(layer.B)
    torch.nn.init.normal_(layer.bias)
    layer.ensure_support()
    return layer


def test_the_naive_operator_is_the_reference(layer):
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    index = support.to_flat_index(layer.S_rows, layer.S_columns, 24)
    parameters = (layer.A, layer.B, layer.S_values)
    wanted = [x, *parameters, layer.bias]
    given = (x, *parameters, index, layer.scaling, layer.bias)
    results = []
    for operator in (naive.linear, reference.linear):
        y = operator(*given)
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_swapped_in_it_computes_what_the_layer_computed(layer):
    x = torch.randn(3, 24, dtype=torch.float64)
    before, names = layer(x), [name for name, _ in layer.named_parameters()]
    model = naive.to_naive(torch.nn.Sequential(layer, torch.nn.Linear(17, 2)))
    assert type(model[0]) is naive.NaiveLinear and type(model[1]) is torch.nn.Linear
    torch.testing.assert_close(model[0](x), before)
    assert [name for name, _ in model[0].named_parameters()] == names
    assert {name: b.dtype for name, b in model[0].named_buffers()} == {"S_index": torch.int64}


def test_it_keeps_a_scaled_copy_of_A_and_nothing_of_W(layer):
    from sltrain_ds.bench.meter import saved_bytes

    naive.to_naive(layer)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    _, beyond = saved_bytes(lambda: layer(x), [x, *layer.parameters(), *layer.buffers()])
    assert beyond == layer.A.nbytes
