"""Direct implementation of the paper's formula without anything from `ops/`, as a baseline for benchmarks.

W = B (s A) + S by mm and an int64 flat scatter_add_. W is not saved; the backward computes it again. It forms the dense
dW = dy^T x, then dB = dW (s A)^T, dA = s B^T dW, and gathers dS. s A is a separate tensor, saved for the backward.
"""

import torch

from sltrain_ds.methods.sltrain_layer import SLTrainLinear
from sltrain_ds.ops import support


class _Naive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scaled_A, B, values, index):
        ctx.save_for_backward(x, scaled_A, B, values, index)
        return x @ _weight(scaled_A, B, values, index).t()

    @staticmethod
    def backward(ctx, dy):
        x, scaled_A, B, values, index = ctx.saved_tensors
        dx = dy @ _weight(scaled_A, B, values, index)
        dW = dy.flatten(0, -2).t() @ x.flatten(0, -2)
        return dx, B.t() @ dW, dW @ scaled_A.t(), dW.view(-1).gather(0, index), None


def _weight(scaled_A, B, values, index):
    W = torch.mm(B, scaled_A)
    W.view(-1).scatter_add_(0, index, values)
    return W


def linear(x, A, B, values, index, scaling, bias=None):
    """y (..., out) = x (..., in) W^T + bias; A (rank, in), B (out, rank), values (nnz,), index (nnz,) int64 flat."""
    y = _Naive.apply(x, A * scaling, B, values, index)
    return y if bias is None else y + bias


class NaiveLinear(SLTrainLinear):
    """SLTrainLinear computed by `linear`, with int64 flat positions (`S_index`) instead of the row-wise support."""

    def forward(self, x):
        return linear(x, self.A, self.B, self.S_values, self.S_index, self.scaling, self.bias)


def to_naive(model: torch.nn.Module) -> torch.nn.Module:
    """Turn every SLTrainLinear of `model` (including itself) into a NaiveLinear in place; parameters are unchanged."""
    for layer in model.modules():
        if type(layer) is SLTrainLinear:
            layer.ensure_support()
            index = support.to_flat_index(layer.S_rows, layer.S_columns, layer.in_features)
            del layer.S_rows, layer.S_columns
            layer._checksum = None  # there is no row-wise support to check
            layer.register_buffer("S_index", index, persistent=False)
            layer.__class__ = NaiveLinear
    return model
