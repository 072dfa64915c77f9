"""The operator as the formula reads, for comparison alone: what a layer costs without any of `ops/`.

W = B (s A) + S by mm and an int64 flat scatter_add_; nothing of W is kept, so the backward builds it again; dW = dy^T x
whole, then dB = dW (s A)^T, dA = s B^T dW, dS gathered. s A is a tensor of its own, saved for the backward.
"""

import torch

from sltrain_ds.methods import SLTrainLinear
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
    """An SLTrainLinear computed by `linear`. Holds int64 flat positions (`S_index`) instead of the row-wise support."""

    def forward(self, x):
        return linear(x, self.A, self.B, self.S_values, self.S_index, self.scaling, self.bias)


def to_naive(model: torch.nn.Module) -> torch.nn.Module:
    """Turn every SLTrainLinear of `model` (itself too) into a NaiveLinear in place, parameters untouched."""
    for layer in model.modules():
        if type(layer) is SLTrainLinear:
            layer.ensure_support()
            index = support.to_flat_index(layer.S_rows, layer.S_columns, layer.in_features)
            del layer.S_rows, layer.S_columns
            layer._checksum = None  # nothing to look after any more
            layer.register_buffer("S_index", index, persistent=False)
            layer.__class__ = NaiveLinear
    return model
