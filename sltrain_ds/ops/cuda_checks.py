"""Argument checks of the CUDA kernels: dtypes, shapes, contiguity and devices."""

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in csrc/cuda/launchers.h


def supports(*tensors: torch.Tensor) -> bool:
    """Whether the kernels support the dtypes of W and the values: float32 and bfloat16."""
    return all(tensor.dtype in DTYPES for tensor in tensors)


def check_support(W, rows, columns, values) -> None:
    """Raise RuntimeError unless scatter-add and gather accept these arguments; same checks as in csrc/moves.cpp."""
    tensors = (W, rows, columns, values)
    require(W.dim() == 2, "W must be a matrix")
    require(rows.dtype == torch.int32 and rows.numel() == W.shape[0] + 1, "S_rows must be int32 (out + 1,)")
    require(columns.dtype in (torch.uint16, torch.int32), "S_columns must be uint16 or int32")
    require(values.numel() == columns.numel(), "S_columns and the values differ in length")
    require(supports(W, values), f"the CUDA kernels take float32 and bfloat16, got {W.dtype} and {values.dtype}")
    require(all(tensor.is_contiguous() for tensor in tensors), "W and the support must be contiguous")
    require(all(tensor.device == W.device for tensor in tensors), "W and the support must be on one device")


def check_adam(p, g, m8, v8, absmax_m, absmax_v, tables, step, offset):
    """Raise RuntimeError unless the 8-bit Adam step accepts these arguments; same checks as in csrc/adam8bit.cpp."""
    tensors, blocks = (p, g, m8, v8, absmax_m, absmax_v, tables), -(-p.numel() // 256)
    require(supports(p, g), f"adam8bit: parameter and gradient must be float32 or bfloat16, got {p.dtype}, {g.dtype}")
    require(m8.dtype == v8.dtype == torch.uint8, "adam8bit: states must be uint8")
    require(
        absmax_m.dtype == absmax_v.dtype == torch.float32 and absmax_m.numel() == absmax_v.numel() == blocks,
        f"adam8bit: absmax must be float32 ({blocks},)",
    )
    require(
        g.numel() == m8.numel() == v8.numel() == p.numel(), "adam8bit: parameter, gradient and states differ in size"
    )
    require(tables.dtype == torch.int32 and tables.numel() == 6402, "adam8bit: tables must be int32 (6402,)")
    require(
        all(tensor.is_contiguous() and tensor.device == p.device for tensor in tensors),
        "adam8bit: tensors must be contiguous, on one device",
    )
    require(step >= 1, f"adam8bit: steps count from 1, got {step}")
    require(
        offset >= 0 and offset % 256 == 0,
        f"adam8bit: offset must be a multiple of 256, where a block begins, got {offset}",
    )


def check_adam4bit(p, g, m4, v4, absmax_m, absmax_v, tables, step, offset):
    """Raise RuntimeError unless the 4-bit Adam step accepts these arguments; same checks as in csrc/adam4bit.cpp."""
    tensors, codes, blocks = (p, g, m4, v4, absmax_m, absmax_v, tables), -(-p.numel() // 2), -(-p.numel() // 128)
    require(supports(p, g), f"adam4bit: parameter and gradient must be float32 or bfloat16, got {p.dtype}, {g.dtype}")
    require(g.numel() == p.numel(), "adam4bit: parameter and gradient differ in size")
    require(
        m4.dtype == v4.dtype == torch.uint8 and m4.numel() == v4.numel() == codes,
        f"adam4bit: states must be uint8 ({codes},)",
    )
    require(
        absmax_m.dtype == absmax_v.dtype == torch.float32 and absmax_m.numel() == absmax_v.numel() == blocks,
        f"adam4bit: absmax must be float32 ({blocks},)",
    )
    require(tables.dtype == torch.float32 and tables.numel() == 62, "adam4bit: tables must be float32 (62,)")
    require(
        all(tensor.is_contiguous() and tensor.device == p.device for tensor in tensors),
        "adam4bit: tensors must be contiguous, on one device",
    )
    require(step >= 1, f"adam4bit: steps count from 1, got {step}")
    require(offset >= 0 and offset % 256 == 0, f"adam4bit: offset must be a multiple of 256, got {offset}")


def check_adam32bit(p, g, m, v, absmax_m, absmax_v, tables, step, offset):
    """Raise RuntimeError unless the Adam step with float32 moments accepts these arguments."""
    tensors = (p, g, m, v)
    require(supports(p, g), f"adam32bit: parameter and gradient must be float32 or bfloat16, got {p.dtype}, {g.dtype}")
    require(m.dtype == v.dtype == torch.float32, "adam32bit: moments must be float32")
    require(all(tensor.numel() == p.numel() for tensor in tensors), "adam32bit: tensors differ in size")
    require(
        all(tensor.is_contiguous() and tensor.device == p.device for tensor in tensors),
        "adam32bit: tensors must be contiguous, on one device",
    )
    require(step >= 1, f"adam32bit: steps count from 1, got {step}")
    require(offset >= 0 and offset % 256 == 0, f"adam32bit: offset must be a multiple of 256, got {offset}")


CHECKS = {"8bit": check_adam, "4bit": check_adam4bit, "32bit": check_adam32bit}


def step_and_offset(scalars):
    """(step, offset) of lr, beta1, beta2, eps, weight_decay, decoupled, step, stochastic, seed, key, offset, ..."""
    return scalars[6], scalars[10]


def require(holds, line):
    if not holds:
        raise RuntimeError(line)
