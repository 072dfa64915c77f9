"""Memory that libraries take from torch's allocator on a GPU: one cuBLAS workspace per calling thread."""

import os

KINDS = ("cpu", "a100", "h100")  # "h100": every device of compute capability 9.0 and above
_BYTES = {"cpu": 0, "a100": 4096 * 1024 * 2 + 16 * 1024 * 8, "h100": 32 << 20}  # torch's defaults (CUDABlas, 2.11)
DETERMINISTIC = ":4096:8"  # of CUBLAS_WORKSPACE_CONFIG: fixed buffers, as train.py sets it
THREADS = 2  # the forward pass's and autograd's


def cublas_workspaces(kind: str, deterministic: bool = False) -> int:
    """Bytes on a device of one of KINDS. If CUBLAS_WORKSPACE_CONFIG (":KIB:COUNT", repeated) is set, it determines the
    size; otherwise a `deterministic` run uses the value it sets itself.
    """
    asked = os.environ.get("CUBLAS_WORKSPACE_CONFIG") or (DETERMINISTIC if deterministic else "")
    numbers = [int(word) for word in asked.split(":") if word.isdigit()]
    if kind != "cpu" and numbers and len(numbers) % 2 == 0:
        each = sum(size * count * 1024 for size, count in zip(numbers[::2], numbers[1::2], strict=True))
        return THREADS * each
    return THREADS * _BYTES[kind]


def kind_of(device) -> str:
    """Kind of a torch device, one of KINDS."""
    import torch

    if torch.device(device).type != "cuda":
        return "cpu"
    return "h100" if torch.cuda.get_device_capability(device)[0] >= 9 else "a100"
