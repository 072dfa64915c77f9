"""Loads DeepSpeed's checkpoint files without letting a pickle choose what to run."""

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from sltrain_ds.errors import UserError
from sltrain_ds.zero.swapped import swapped

# Everything beyond tensors and plain containers that DeepSpeed 0.19.8 writes: an int enum, two classes of numbers.
ALLOWED = (LossScaler, ZeroStageEnum, fragment_address)


def _stage(kind, name):
    """What Python 3.11.0 to 3.11.3 write for a member of an enum is getattr(enum, name); nothing else is looked up."""
    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise UnpicklingError(f"GLOBAL getattr({getattr(kind, '__name__', kind)}, {name!r})")
    return ZeroStageEnum[name]


_torch_load = torch.load


def load(path: str | Path, map_location="cpu", mmap: bool = False):
    """The contents of a `.pt` file that a DeepSpeed engine of stage 0 to 3 wrote, fp32 or bf16, torch or 8-bit Adam.

    Only tensors, plain containers and `ALLOWED` are built, through `torch.load(weights_only=True)`. With `mmap` the
    tensors stay in the file until they are read; do not write the file while they live.
    Raises `UserError` naming the file if it is missing, damaged, or holds any other type.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: cut short, or not in the zip format of torch.save")
    try:
        with torch.serialization.safe_globals([*ALLOWED, (_stage, "builtins.getattr")]):
            return _torch_load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except Exception as error:  # what a broken or hostile file makes the reader raise is open-ended
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, UnpicklingError) else None
        if refused:
            reason = f"refused: it holds {refused[1]}, which no DeepSpeed checkpoint needs and which could run code"
        else:
            reason = f"damaged ({str(error).partition('. ')[0] or type(error).__name__})"
        raise UserError(f"{path}: {reason}") from error


@contextmanager
def safe_checkpoint_engine(engine) -> Iterator[None]:
    """Inside the block `engine.load_checkpoint(...)` reads every file through `load`.

    DeepSpeed 0.19.8 calls `torch.load(weights_only=False)` in `runtime/checkpoint_engine/torch_checkpoint_engine.py`
    and again, past the engine, in `utils/zero_to_fp32.py` and `runtime/zero/stage3.py`: so `torch.load` itself is what
    is replaced. Raises `UserError` if the engine was configured with a checkpoint writer that reads otherwise.
    """
    if not isinstance(engine.checkpoint_engine, TorchCheckpointEngine):
        name = type(engine.checkpoint_engine).__name__
        raise UserError(f"checkpoint: {name} cannot be loaded without unpickling; leave out checkpoint.writer")

    def load_safely(path, map_location=None, mmap=False, **_):
        return load(path, map_location, mmap)

    with swapped(torch, "load", load_safely):
        yield
