"""y = x W^T + b with W = scaling * B A + S, as a torch.library operator with fake and autograd parts.

Compose mode: W is built in one workspace shared by all layers (one GEMM with the scaling folded in, then S scattered
in), used in one dense GEMM, and forgotten; the backward builds it again. Saved for the backward: x and the
parameters.

Precision: the compute dtype is x's. A and B enter the GEMM in it, which accumulates in fp32 and rounds BA once; S is
added in fp32 and rounded once. So W in bf16 carries two roundings (2^-9 relative each) and the workspace stays at two
bytes an element, where an fp32 workspace would double both. dW is one bf16 GEMM, accumulated in fp32; dA and dB are
GEMMs over it, and dS reads it at the support. Forward and backward build W from the same tensors in the same way:
they see the same bits.
"""

import torch

from sltrain_ds.ops import sparse, workspace


def linear(x, A, B, values, rows, columns, scaling, bias=None):
    """y (..., out) = x (..., in) W^T + bias.

    A (rank, in), B (out, rank), values (nnz,), bias (out,) or None; rows int32 (out + 1) and columns (nnz,) a checked
    support. Under autocast x is cast as ``nn.Linear`` casts it, and the parameters where W is built, so that no
    casted copy is saved.
    """
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != A.dtype:
        raise RuntimeError(f"x and the weights must have the same dtype, got {x.dtype} and {A.dtype}")
    return torch.ops.sltrain.linear(x, A, B, values, rows, columns, bias, scaling)


def compose(A, B, values, rows, columns, scaling, dtype):
    """W (out, in) in the shared workspace: valid until the workspace is taken again."""
    W = workspace.take(B.shape[0], A.shape[1], dtype, A.device)
    torch.addmm(W, B.to(dtype), A.to(dtype), beta=0, alpha=scaling, out=W)
    sparse.scatter_add_(W, rows, columns, values)
    return W


@torch.library.custom_op("sltrain::linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    W = compose(A, B, values, rows, columns, scaling, x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    y = torch.mm(flat, W.t()) if bias is None else torch.addmm(bias.to(x.dtype), flat, W.t())
    return y.view(*x.shape[:-1], W.shape[0])


@_linear.register_fake
def _(x, A, B, values, rows, columns, bias, scaling):
    return x.new_empty(*x.shape[:-1], B.shape[0])


@torch.library.custom_op("sltrain::linear_backward", mutates_args=())
def _linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scaling: float,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_values: bool,
) -> list[torch.Tensor]:
    dtype = x.dtype
    dx, dA, dB, dvalues = grads = _gradient_buffers(x, A, B, values, need_x, need_A, need_B, need_values)
    flat_dy = dy.reshape(-1, dy.shape[-1])
    if need_x:
        W = compose(A, B, values, rows, columns, scaling, dtype)
        torch.mm(flat_dy, W, out=dx.view(-1, x.shape[-1]))
    if need_A or need_B or need_values:
        dW = workspace.take(B.shape[0], A.shape[1], dtype, x.device)
        torch.mm(flat_dy.t(), x.reshape(-1, x.shape[-1]), out=dW)
        if need_values:
            sparse.gather(dW, rows, columns, out=dvalues)
        if need_A:
            _scaled_product(B.to(dtype).t(), dW, scaling, out=dA)
        if need_B:
            _scaled_product(dW, A.to(dtype).t(), scaling, out=dB)
    return grads


def _scaled_product(left, right, scaling, out):
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=0, alpha=scaling, out=out)
    else:  # autocast: the gradient is wider than the product
        out.copy_(torch.mm(left, right)).mul_(scaling)


@_linear_backward.register_fake
def _(dy, x, A, B, values, rows, columns, scaling, need_x, need_A, need_B, need_values):
    return _gradient_buffers(x, A, B, values, need_x, need_A, need_B, need_values)


def _gradient_buffers(x, A, B, values, *needed):
    # what is not needed comes back empty: an operator's outputs cannot be None
    wanted = zip((x, A, B, values), needed, strict=True)
    return [torch.empty(t.shape if need else (0,), dtype=t.dtype, device=t.device) for t, need in wanted]


def _save(ctx, inputs, output):
    x, A, B, values, rows, columns, bias, scaling = inputs
    ctx.save_for_backward(x, A, B, values, rows, columns)
    ctx.scaling = scaling
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    x, A, B, values, rows, columns = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = [None] * 4
    if any(needs[:4]):
        found = torch.ops.sltrain.linear_backward(dy, x, A, B, values, rows, columns, ctx.scaling, *needs[:4])
        grads = [grad if need else None for grad, need in zip(found, needs[:4], strict=True)]
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=ctx.bias_dtype) if needs[6] else None
    return *grads, None, None, dbias, None


def _refuse(ctx, *grads):
    raise RuntimeError(
        "SLTrainLinear has no double backward: its backward builds W in a shared workspace and keeps no graph"
    )


_linear.register_autograd(_backward, setup_context=_save)
_linear_backward.register_autograd(_refuse)
