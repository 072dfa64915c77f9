"""Files that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sltrain_ds.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name beside `path`, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out`, which becomes `out` when the block ends and vanishes when it raises.

    Raises `UserError` if `out` is a file or already holds something.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty directory; give a new one")
    partial = out.absolute().with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); give a directory that can be written") from None
    try:
        yield partial
        mode = partial.stat().st_mode & 0o666  # safetensors writes for the owner alone; the umask decides here
        for file in partial.iterdir():
            file.chmod(mode)
        os.replace(partial, out)  # takes the place of an empty directory too
    finally:
        shutil.rmtree(partial, ignore_errors=True)
