"""Sizes on which kernels, checkpoints and the memory estimate must agree, each said once. Imports no torch."""

from typing import NamedTuple


class StateFormat(NamedTuple):
    """How a quantised Adam moment is stored."""

    block: int  # values that share one fp32 absmax
    per_byte: int  # codes in a byte


STATES = {"8bit": StateFormat(256, 1), "4bit": StateFormat(128, 2)}
ALIGNMENT = 256  # of a segment's offset in its parameter: a whole number of blocks in every format

WIDEST_UINT16 = 65_536  # features up to which a support's columns fit in 16 bits

CHUNK_BYTES = 16 << 20  # of fp32 logits in the chunked loss; half as much in the weights' dtype is kept beside them
CUDA_CHUNK_BYTES, CUDA_MULTIPLE, CUDA_MOST = 128 << 20, 256, 1024  # tokens that fill the device; at least the multiple

SIZE_LIMIT = 2**31 - 1  # of what is a dimension of a tensor
STEP_LIMIT = 2**53  # of what is counted: a double holds it exactly
INT64 = 2**63 - 1  # DeepSpeed's own default of some counts is sys.maxsize


def nonzeros(density: float, out_features: int, in_features: int) -> int:
    """Non-zeros of an (out, in) support: exactly int(density * out * in)."""
    return int(density * out_features * in_features)


def column_bytes(in_features: int) -> int:
    """Bytes of a column index: uint16, or int32 where in > 65,536."""
    return 2 if in_features <= WIDEST_UINT16 else 4


def chunk_tokens(vocabulary: int, device: str = "cpu") -> int:
    """Tokens in a chunk of the chunked loss. A GPU takes more at once, in whole tiles of its products."""
    if device == "cuda":
        fit = CUDA_CHUNK_BYTES // (4 * vocabulary)
        return min(CUDA_MOST, max(CUDA_MULTIPLE, fit // CUDA_MULTIPLE * CUDA_MULTIPLE))
    return max(1, CHUNK_BYTES // (4 * vocabulary))
