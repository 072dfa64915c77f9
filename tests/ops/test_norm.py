import pytest
import torch
from bounds import of_sum

from sltrain_ds.zero.per_layer.clipping import sum_of_squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 1025, 70_001, 300_000])
def test_sum_of_squares_equals_float64s_for_any_number_of_threads(dtype, numel):
    torch.manual_seed(numel)
    tensors = [torch.randn(numel).to(dtype) * 3, torch.randn(7, 5).to(dtype).t()]
    expected = sum(float(tensor.double().square().sum()) for tensor in tensors)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(float(sum_of_squares(tensors, "cpu")))
    torch.set_num_threads(threads)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(expected, rel=of_sum(torch.float32, 1024 // 64))  # the fp32 sums' terms


def test_sum_of_squares_passes_on_what_is_not_finite():
    assert sum_of_squares([torch.tensor([1.0, float("nan")])], "cpu").isnan()
    assert sum_of_squares([torch.tensor([float("inf")], dtype=torch.bfloat16)], "cpu").isinf()
    assert float(sum_of_squares([], "cpu")) == 0
