"""Output of every bench: the environment, a Markdown table printed row by row, and all raw numbers as JSON."""

import contextlib
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

import torch

from sltrain_ds import __version__
from sltrain_ds.files import write_json, write_text
from sltrain_ds.ops.device_name import device_name

WIDTHS = {
    "layer": 24,
    "config": 14,
    "method": 20,
    "operator": 20,
    "optimizer": 16,
    "elements": 9,
    "row": 43,
    "how": 9,
}  # minimum cell widths by column
PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes")


class Report:
    """A bench's output. Rows are printed as they are measured; with `out`, OUT/NAME.md and OUT/NAME.json are also
    rewritten after every case, so that an interrupted bench keeps its results.
    """

    def __init__(self, name: str, columns: list[str], device, out: Path | None = None, notes: list[str] = ()):
        self.name, self.out = name, Path(out) if out else None
        self.environment, self.cases = environment(device), []
        self.widths = [max(len(column), WIDTHS.get(column, 7)) for column in columns]
        self.lines = []
        self._say(describe(self.environment), "", *(line for note in notes for line in (note, "")))
        self._say(self._row(columns), self._row(["-" * width for width in self.widths]))

    def add(self, case: dict, rows: list[list]) -> None:
        """Add one measured case: `case` to the JSON unchanged, `rows` to the table."""
        self.cases.append(case)
        self._say(*map(self._row, rows))
        if self.out:
            write_text(self.out / f"{self.name}.md", "\n".join(self.lines) + "\n")
            whole = {"format": 1, "bench": self.name, "environment": self.environment, "cases": self.cases}
            write_json(self.out / f"{self.name}.json", whole)

    def _row(self, cells) -> str:
        pairs = zip(cells, self.widths, strict=True)
        padded = (cell.ljust(width) if isinstance(cell, str) else shown(cell).rjust(width) for cell, width in pairs)
        return f"| {' | '.join(padded)} |"

    def _say(self, *lines):
        self.lines += lines
        print(*lines, sep="\n", flush=True)


def shown(cell) -> str:
    """Format a table cell: floats with three significant digits (1,234 from 1,000 up), "-" for None."""
    if cell is None:
        return "-"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:#.3g}".rstrip(".")


def megabytes(nbytes: int | None) -> float | None:
    """Bytes in MB of 1e6 bytes."""
    return None if nbytes is None else nbytes / 1e6


def environment(device) -> dict:
    """Device, versions, threads, load and command."""
    from sltrain_ds.ops import builder, cuda

    device = torch.device(device)
    with contextlib.redirect_stdout(sys.stderr):  # a build announces itself
        builder.load()
        kernels = ("CUDA" if cuda.load() else "no CUDA") if device.type == "cuda" else builder.status()[0]
    return {
        "device": device_name(device),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "sltrain_ds": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "ops": kernels,
        "cpu_level": builder.cpu_level_in_force(),
        "command": shlex.join(["sltrain-ds", *sys.argv[1:]]),
    }


def describe(found: dict) -> str:
    """The command and its environment, one line each."""
    versions = ", ".join(f"{name} {found[name]}" for name in ("sltrain_ds", "python", *PACKAGES))
    where = f"{found['device']}, {found['cores']} cores, {found['threads']} threads, load {found['load']} at the start"
    level = f", CPU level {found['cpu_level']}" if found["cpu_level"] else ""
    return f"`{found['command']}`\n{where}; {versions}, ops {found['ops']}{level}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
