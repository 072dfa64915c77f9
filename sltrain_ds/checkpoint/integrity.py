"""Checks of a checkpoint's files: a full disk, lost files and flipped bits are one-line errors."""

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sltrain_ds.errors import UserError


def check_whole(files: Iterable[Path]) -> None:
    """Every record of these `torch.save` files against the CRC-32 written beside it, which `torch.load` leaves unread.

    Reads them once, some 2 GB a second. Raises `UserError` naming a file that is missing or damaged.
    """
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; the checkpoint is incomplete, choose another")
        try:
            with zipfile.ZipFile(file) as records:
                bad = records.testzip()
        except Exception:  # what a broken file makes the reader raise is open-ended
            raise UserError(f"{file}: cut short, or not in the zip format of torch.save; choose another") from None
        if bad:
            raise UserError(f"{file}: damaged, {bad} does not match its checksum; choose another checkpoint")


def files_of_rank(folder: Path, zero_stage: int, rank: int) -> list[Path]:
    """The files that this rank of a run reads, as DeepSpeed 0.19.8 names them (`engine._get_ckpt_name` and others)."""
    own = f"zero_pp_rank_{rank}_mp_rank_00"
    model = f"{own}_model_states.pt" if zero_stage == 3 else "mp_rank_00_model_states.pt"
    return [folder / model, *folder.glob(f"*{own}_optim_states.pt")]


def files_with_weights(folder: Path) -> list[Path]:
    """The files that hold the weights: one at stages 0 to 2, at stage 3 those of every rank."""
    whole = folder / "mp_rank_00_model_states.pt"
    return [whole] if whole.is_file() else sorted(folder.glob("*zero_pp_rank_*_states.pt"))


@contextmanager
def told_as_one_line(folder: Path) -> Iterator[None]:
    """What torch's writer raises where the disk is full or a quota is reached becomes a `UserError` naming `folder`."""
    try:
        yield
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise UserError(
            f"{folder}: the checkpoint could not be written, the disk may be full; make room, then --resume latest"
        ) from None
