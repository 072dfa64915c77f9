import numpy as np
import pytest
import torch
from bounds import close, of_chain

from sltrain_ds.errors import UserError
from sltrain_ds.methods.low_rank_layer import LowRankLinear, gaussian_spectrum
from sltrain_ds.methods.registry import get


@pytest.mark.parametrize("out, in_, rank, alpha", [(96, 64, 8, 32), (40, 120, 40, 1), (7, 5, 1, 8)])
def test_starts_with_the_asked_std_and_balanced_factors(out, in_, rank, alpha):
    made = LowRankLinear(in_, out, rank=rank, alpha=alpha, init_std=0.01)
    W = made.dense_weight()
    assert W.shape == (out, in_)
    assert W.square().mean().sqrt().item() == pytest.approx(0.01, rel=1e-4)
    close(made.A @ made.A.T, made.B.T @ made.B, of_chain(torch.float32, max(out, in_), 2))


def test_spectrum_is_a_gaussian_matrixs():
    drawn = torch.linalg.svdvals(torch.randn(300, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert np.abs(gaussian_spectrum(300, 500) / drawn.numpy() - 1).max() < 0.03


def test_both_factors_get_gradients_at_the_start():
    made = LowRankLinear(30, 20, rank=4, alpha=8, bias=True)
    x = torch.randn(5, 30)
    y = made(x)
    torch.testing.assert_close(y, x @ made.dense_weight().T + made.bias)
    y.square().sum().backward()
    assert made.A.grad.abs().sum() > 0 and made.B.grad.abs().sum() > 0 and made.bias.grad is not None
    assert made.dense_sparse() is None
    assert made.roles == {"A": "factors", "B": "factors"}
    assert made.flops_per_token() == 2 * 4 * (30 + 20)


def test_reset_uses_the_generator_alone():
    drawn = []
    for dtype in (torch.float32, torch.bfloat16):
        made = LowRankLinear(30, 20, rank=4, alpha=8, dtype=dtype)
        made.reset_parameters(torch.Generator().manual_seed(5))
        drawn.append(made.B.detach())
    assert torch.equal(drawn[0].bfloat16(), drawn[1])


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match=r"rank = 6 exceeds min\(in, out\) = 5"):
        LowRankLinear(5, 9, rank=6, alpha=1)
    with pytest.raises(UserError, match="init_std = 0 must be above 0"):
        get("low_rank")(rank=2, alpha=1, init_std=0)
    with pytest.raises(UserError, match=r"'galore' is not known; choose one of sltrain, full_rank, low_rank"):
        get("galore")
