import pytest
import torch
from deepspeed.profiling.flops_profiler.profiler import FlopsProfiler
from torch import nn

from sltrain_ds import SLTrainLinear


def profiled(module, x):
    profiler = FlopsProfiler(module)
    profiler.start_profile()
    y = module(x)
    profiler.stop_profile()
    flops = profiler.get_total_flops()
    profiler.end_profile()
    return y, flops


@pytest.mark.parametrize("mode", ["compose", "factored"])
@pytest.mark.parametrize("bias", [False, True])
def test_deepspeeds_profiler_counts_the_layer(bias, mode):
    layer = SLTrainLinear(96, 160, rank=16, density=0.05, alpha=8, bias=bias, op_mode=mode)
    x = torch.randn(4, 128, 96)
    expected = layer(x)
    y, flops = profiled(nn.Sequential(layer), x)
    tokens = 4 * 128
    formula = {
        "compose": tokens * layer.flops_per_token() + 2 * layer.rank * 96 * 160,  # y = x W^T, and W = s B A once a call
        "factored": 2 * tokens * layer.rank * (96 + 160),  # its dense products; the sparse one is not torch's
    }
    assert layer.flops_per_token() == 2 * 96 * 160
    assert flops == pytest.approx(formula[mode], rel=0.03)
    torch.testing.assert_close(y, expected)


def test_the_backward_runs_under_the_profiler_too():
    layer = SLTrainLinear(32, 48, rank=4, density=0.05, alpha=8)
    profiler = FlopsProfiler(nn.Sequential(layer))
    profiler.start_profile()
    layer(torch.randn(64, 32)).sum().backward()
    profiler.stop_profile()
    profiler.end_profile()
    assert layer.S_values.grad is not None
