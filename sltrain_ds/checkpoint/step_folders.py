"""A run's checkpoint folders, step_NNNNNNNN: complete once they hold sltrain.json. Imports no torch."""

import re
from pathlib import Path

STATE_FILE = "sltrain.json"  # ours, written last: a checkpoint without it is incomplete


def step_folders(folder: Path) -> dict[int, Path]:
    """Step -> folder, in order, of those a run writes; a copy that is kept as step_best is the user's own."""
    named = {path: re.fullmatch(r"step_(\d{8,})", path.name) for path in folder.glob("step_*")}
    return dict(sorted((int(match[1]), path) for path, match in named.items() if match))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first; those a stop cut short are not among them."""
    return [path for path in step_folders(folder).values() if (path / STATE_FILE).is_file()]
