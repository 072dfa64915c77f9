"""Mode "keep_step": builds W once per optimizer step, sums dW over its micro-batches and projects it once.

dA = s B^T dW, dB = s dW A^T and dS = dW on the support are linear in dW, so the sum can be taken first. While the mode
is on, a layer holds W and the sum, both (out, in) in the compute dtype. A, B and S are part of the graph only in the
last micro-batch, so gradient hooks (DeepSpeed's) see one complete gradient per step.

``micro_batches`` marks the beginning and end of a step. Outside of it, under torch.compile, and for an x that does not
require grad, the layer computes as in "keep".
"""

from collections.abc import Iterable, Iterator

import torch

from sltrain_ds.ops import sltrain_linear
from sltrain_ds.ops.gemm import column_sum_, gemm_
from sltrain_ds.ops.sltrain_linear import as_matrix


class Held:
    """Tensors that a layer holds: W, valid in this step if `built`, and the sum of dW, started if `summed`."""

    def __init__(self):
        self.W = self.dW = None
        self.running = self.last = self.built = self.summed = False

    def begin(self, first: bool, last: bool) -> None:
        """Begin a micro-batch; `first` and `last` mark the step's first and last one."""
        self.running, self.last = True, last
        if first:
            self.built = self.summed = False

    def end(self) -> None:
        self.running = self.built = self.summed = False

    def add(self, dy, x) -> None:
        """dW += dy^T x"""
        if self.dW is None:
            self.dW = torch.empty_like(self.W)
        gemm_(self.dW, dy.t(), x, add=self.summed)
        self.summed = True


def micro_batches(model: torch.nn.Module, batches: Iterable) -> Iterator:
    """Yield the micro-batches of one optimizer step. Each must run forward and backward before the next is requested,
    and the weights must not change before the last one is done.
    """
    batches, held = list(batches), holders(model)
    try:
        for number, batch in enumerate(batches):
            for one in held:
                one.begin(number == 0, number == len(batches) - 1)
            yield batch
    finally:
        for one in held:
            one.end()


def holders(model: torch.nn.Module) -> list[Held]:
    """The `Held` of every layer in this mode."""
    return [module.held for module in model.modules() if isinstance(getattr(module, "held", None), Held)]


def serves(held: Held, x: torch.Tensor) -> bool:
    """Whether `linear` can be called: a step is running, and x requires grad or grad mode is off."""
    grad = torch.is_grad_enabled()
    return held.running and not x.is_meta and not torch.compiler.is_compiling() and (x.requires_grad or not grad)


def linear(held: Held, x, A, B, values, rows, columns, scaling, bias=None):
    """``sltrain_linear.linear`` with this step's W; same shapes and dtypes."""
    dtype = sltrain_linear.compute_dtype(x)
    if not held.built:
        with torch.no_grad():
            if held.W is None or held.W.dtype != dtype or held.W.device != x.device:
                held.W, held.dW = torch.empty(B.shape[0], A.shape[1], dtype=dtype, device=x.device), None
            sltrain_linear.compose(A, B, values, rows, columns, scaling, dtype, held.W)
        held.built = True
    if not held.last:
        A, B, values = A.detach(), B.detach(), values.detach()
    return _Held.apply(x.to(dtype), A, B, values, bias, rows, columns, scaling, held)


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, values, bias, rows, columns, scaling, held):
        ctx.save_for_backward(x, A, B, values, rows, columns) if held.last else ctx.save_for_backward(x)
        ctx.held, ctx.last, ctx.scaling, ctx.bias = held, held.last, scaling, None if bias is None else bias.dtype
        y = x.new_empty(*x.shape[:-1], held.W.shape[0])
        gemm_(as_matrix(y), as_matrix(x), held.W.t(), bias=None if bias is None else bias.to(x.dtype))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        held, (x, *last) = ctx.held, ctx.saved_tensors
        if not held.built:
            raise RuntimeError("keep_step: the backward pass must run within the step of its forward pass")
        need_x, need_A, need_B, need_values, need_bias = ctx.needs_input_grad[:5]
        dx = dA = dB = dvalues = dbias = None
        flat_dy, flat_x = as_matrix(dy), as_matrix(x)
        if need_x:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            gemm_(as_matrix(dx), flat_dy, held.W)
        if need_bias:
            dbias = column_sum_(dy.new_empty(dy.shape[-1], dtype=ctx.bias), flat_dy)
        held.add(flat_dy, flat_x)
        if ctx.last:
            A, B, values, rows, columns = last
            needs = need_A, need_B, need_values
            dA, dB, dvalues = (torch.empty_like(t) if n else None for t, n in zip((A, B, values), needs, strict=True))
            sltrain_linear.project(held.dW, A, B, rows, columns, ctx.scaling, needs, (dA, dB, dvalues))
            held.summed = False  # a layer used twice starts a new sum; correct because the projection is linear
        return dx, dA, dB, dvalues, dbias, None, None, None, None
