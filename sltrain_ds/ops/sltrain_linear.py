"""y = x W^T + b with W = scaling * B A + S, as a torch.library operator with fake and autograd parts.

Four modes compute the same result (``modes`` chooses):

compose         W is built in a workspace shared by all layers (one GEMM that includes the scaling, then a scatter of
                S) and used in one dense GEMM; it is not saved, and the backward builds it again. Saved for the
                backward: x and the parameters.
keep            the same, but W is kept from forward to backward.
factored        W is never built: u = x A^T, y = scaling * u B^T + x S^T through a blocked sparse product (``spmm``).
                Saved: x, the parameters and u.
factored_dense  factored, with only S made dense in the workspace. The factored mode falls back to it on a GPU and
                without the C++ ops.

Precision: the compute dtype is x's. GEMMs accumulate in fp32 and round once. In compose and keep, S is added to BA in
fp32 and rounded once, so W in bf16 has two roundings (2^-9 relative each) and the workspace needs two bytes per
element; an fp32 workspace would double it. dW is one GEMM, dA and dB are GEMMs of it, and dS is gathered from it at the
support. In the factored modes u and du have one rounding, y and dx one for each of their two parts. Forward and
backward use the same bits of W, or of A, B and S. No mode's bits depend on the number of CPU threads.

This file is the reference. If the C++ ops are loaded and no mode or subclass other than autograd intercepts the call,
csrc/layer.cpp computes the same, bit for bit, in one call for the forward and one for the backward.
"""

import torch

from sltrain_ds.ops import builder, sparse, spmm, workspace
from sltrain_ds.ops.gemm import column_sum_, gemm_, is_counted

MODES = ("compose", "keep", "factored", "factored_dense")


def linear(x, A, B, values, rows, columns, scaling, bias=None, mode="compose"):
    """y (..., out) = x (..., in) W^T + bias.

    A (rank, in), B (out, rank), values (nnz,), bias (out,) or None; rows int32 (out + 1) and columns (nnz,) a checked
    support; mode one of MODES. Under autocast x is cast as in ``nn.Linear``, and the parameters where they are used, so
    that no cast copy is saved.
    """
    dtype = compute_dtype(x)
    if x.dtype != A.dtype and not _autocast(x):
        raise RuntimeError(f"x and the weights must have the same dtype, got {x.dtype} and {A.dtype}")
    x = x.to(dtype)
    if mode == "keep" and not torch.is_grad_enabled():
        mode = "compose"  # no backward needs W
    arguments = (x, A, B, values, rows, columns, bias, scaling)
    if not _is_plain(x):
        return torch.ops.sltrain.linear(*arguments, mode)[0]
    if _native_serves(x, values):
        return torch.ops.sltrain.layer.default(*arguments, MODES.index(mode))
    return _Eager.apply(*arguments, mode)[0]


def _native_serves(x, values):
    """Whether csrc/layer.cpp can do the whole pass."""
    return builder.load() and not is_counted() and (x.device.type == "cpu" or sparse.on_cuda(x, values))


def compute_dtype(x) -> torch.dtype:
    """x's dtype, or under autocast the one to which ``nn.Linear`` would cast x."""
    return torch.get_autocast_dtype(x.device.type) if _autocast(x) else x.dtype


def _autocast(x):
    return not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def compose(A, B, values, rows, columns, scaling, dtype, out=None):
    """Build W (out, in) in ``out``, or in the shared workspace, where it is valid until the next ``workspace.take``."""
    W = workspace.take(B.shape[0], A.shape[1], dtype, A.device) if out is None else out
    gemm_(W, B.to(dtype), A.to(dtype), scaling)
    sparse.scatter_add_(W, rows, columns, values)
    return W


def _dense_sparse(x, B, values, rows, columns):
    S = workspace.take(B.shape[0], x.shape[1], x.dtype, x.device).zero_()
    sparse.scatter_add_(S, rows, columns, values)
    return S


def _sparse_is_dense(mode, x):
    return mode == "factored_dense" or not spmm.available(x.device)


def _forward(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, tensor that the mode keeps for the backward: W, u, or empty)"""
    flat, dtype = as_matrix(x), x.dtype
    bias = None if bias is None else bias.to(dtype)
    y, kept = _outputs(x, A, B, mode)
    flat_y = y.view(-1, B.shape[0])
    if mode in ("compose", "keep"):
        W = compose(A, B, values, rows, columns, scaling, dtype, kept if mode == "keep" else None)
        gemm_(flat_y, flat, W.t(), bias=bias)
        return y, kept
    gemm_(kept, flat, A.to(dtype).t())
    gemm_(flat_y, kept, B.to(dtype).t(), scaling, bias)
    if _sparse_is_dense(mode, x):
        gemm_(flat_y, flat, _dense_sparse(flat, B, values, rows, columns).t(), add=True)
    else:
        spmm.add_product_(flat_y, flat, rows, columns, values)
    return y, kept


_linear = torch.library.custom_op("sltrain::linear", _forward, mutates_args=())


@_linear.register_fake
def _(x, A, B, values, rows, columns, bias, scaling, mode):
    return _outputs(x, A, B, mode)


def _outputs(x, A, B, mode):
    sizes = {"keep": (B.shape[0], A.shape[1]), "compose": (0,)}
    kept = sizes.get(mode) or (x.numel() // max(1, x.shape[-1]), A.shape[0])
    return x.new_empty(*x.shape[:-1], B.shape[0]), x.new_empty(kept)


def _gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    kept: torch.Tensor | None,
    scaling: float,
    mode: str,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_values: bool,
    need_bias: bool,
) -> list[torch.Tensor]:
    grads = _gradient_buffers(x, A, B, values, need_x, need_A, need_B, need_values, need_bias)
    needs, dy = (need_x, need_A, need_B, need_values), as_matrix(dy)
    if any(needs):
        backward = _backward_of_W if mode in ("compose", "keep") else _backward_of_factors
        backward(dy, as_matrix(x), A, B, values, rows, columns, kept, scaling, mode, needs, grads[:4])
    if need_bias:
        column_sum_(grads[4], dy)
    return grads


def _backward_of_W(dy, x, A, B, values, rows, columns, kept, scaling, mode, needs, grads):
    dx, dtype = grads[0], x.dtype
    if needs[0]:
        W = kept if mode == "keep" else compose(A, B, values, rows, columns, scaling, dtype)
        gemm_(dx.view(x.shape), dy, W)
    if any(needs[1:]):
        dW = gemm_(workspace.take(B.shape[0], A.shape[1], dtype, x.device), dy.t(), x)
        project(dW, A, B, rows, columns, scaling, needs[1:], grads[1:])


def project(dW, A, B, rows, columns, scaling, needs, grads):
    """Write dA = s B^T dW, dB = s dW A^T and dS = dW on the support (paper, section 3.3) to `grads` where needed."""
    (dA, dB, dvalues), (need_A, need_B, need_values) = grads, needs
    if need_values:
        sparse.gather(dW, rows, columns, out=dvalues)
    if need_A:
        gemm_(dA, B.to(dW.dtype).t(), dW, scaling)
    if need_B:
        gemm_(dB, dW, A.to(dW.dtype).t(), scaling)


def _backward_of_factors(dy, x, A, B, values, rows, columns, u, scaling, mode, needs, grads):
    (dx, dA, dB, dvalues), (need_x, need_A, need_B, need_values) = grads, needs
    dtype = x.dtype
    if need_x or need_A:
        du = gemm_(dy.new_empty(u.shape), dy, B.to(dtype), scaling)
    if need_A:
        gemm_(dA, du.t(), x)
    if need_B:
        gemm_(dB, dy.t(), u, scaling)
    flat_dx = dx.view(x.shape) if need_x else dx
    if need_x:
        gemm_(flat_dx, du, A.to(dtype))
    if not (need_x or need_values):
        return
    if not _sparse_is_dense(mode, x):
        spmm.backward_(dy, x, rows, columns, values, flat_dx, dvalues)
        return
    if need_x:
        gemm_(flat_dx, dy, _dense_sparse(x, B, values, rows, columns), add=True)
    if need_values:
        dW = gemm_(workspace.take(B.shape[0], A.shape[1], dtype, x.device), dy.t(), x)
        sparse.gather(dW, rows, columns, out=dvalues)


_linear_backward = torch.library.custom_op("sltrain::linear_backward", _gradients, mutates_args=())


@_linear_backward.register_fake
def _(dy, x, A, B, values, rows, columns, kept, scaling, mode, need_x, need_A, need_B, need_values, need_bias):
    return _gradient_buffers(x, A, B, values, need_x, need_A, need_B, need_values, need_bias)


def as_matrix(x):
    """(tokens, features), contiguous"""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _gradient_buffers(x, A, B, values, *needed):
    # gradients that are not needed are empty: an operator's outputs cannot be None
    wanted = zip((x, A, B, values, A), (x.shape, A.shape, B.shape, values.shape, B.shape[:1]), needed, strict=True)
    return [torch.empty(shape if need else (0,), dtype=t.dtype, device=t.device) for t, shape, need in wanted]


def _save(ctx, inputs, output):
    x, A, B, values, rows, columns, _bias, scaling, mode = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, A, B, values, rows, columns, *output[1:] * (mode != "compose"))
    ctx.scaling, ctx.mode = scaling, mode


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 9
    x, A, B, values, rows, columns, *kept = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:4], ctx.needs_input_grad[6]]  # x, A, B, values, bias
    # with create_graph, the operator raises: there is no double backward
    call = _gradients if _is_plain(dy) and not torch.is_grad_enabled() else torch.ops.sltrain.linear_backward
    found = call(dy, x, A, B, values, rows, columns, kept[0] if kept else None, ctx.scaling, ctx.mode, *needs)
    *grads, dbias = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    return *grads, None, None, dbias, None, None


class _Eager(torch.autograd.Function):
    """The same forward and backward without the dispatcher, which costs 0.15 ms per layer in Python."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


def _is_plain(x):
    """Whether only autograd observes the call: no tracing, no tensor subclass, no functorch transform."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _refuse(ctx, *grads):
    raise RuntimeError(
        "SLTrainLinear has no double backward: its backward builds W in a shared workspace and keeps no graph"
    )


_linear.register_autograd(_backward, setup_context=_save)
_linear_backward.register_autograd(_refuse)
