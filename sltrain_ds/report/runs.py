"""Reader of run directories: config, metrics and baselines."""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from sltrain_ds.checkpoint.step_folders import STATE_FILE, complete_checkpoints
from sltrain_ds.errors import UserError


@dataclass
class Run:
    """One run. `steps` and `evals` are the lines of metrics.jsonl by kind, one per step, in order; `notes` are shown
    on the page."""

    name: str
    dir: Path
    config: dict
    steps: list[dict]
    evals: list[dict]
    baselines: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def block(self) -> dict:
        return self.config.get("sltrain", {})

    @property
    def method(self) -> str:
        return self.block.get("method", {}).get("name", "?")

    @cached_property
    def world_size(self) -> int:
        """World size stored in the newest checkpoint; 1 without one."""
        found = complete_checkpoints(self.dir / "checkpoints")
        try:
            return int(json.loads((found[-1] / STATE_FILE).read_text(encoding="utf-8"))["world_size"])
        except (IndexError, OSError, ValueError, KeyError, TypeError):
            return 1

    def column(self, key: str, lines: str = "steps") -> tuple[list, list]:
        """(steps, values) of the lines with a number under `key`; non-finite values become NaN, a gap in the plot."""
        found = [(line["step"], line[key]) for line in getattr(self, lines) if _number(line.get(key))]
        return [s for s, _ in found], [v if math.isfinite(v) else math.nan for _, v in found]


def read(directories) -> list[Run]:
    """Read the runs of these directories and give them distinct names. `UserError` if one cannot be shown."""
    paths = [Path(directory) for directory in directories]
    seen = set()
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"{path}: given twice; name each run directory once")
        seen.add(path.resolve())
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths):
    names = [path.resolve().name for path in paths]
    return [n if names.count(n) == 1 else f"{p.resolve().parent.name}/{n}" for p, n in zip(paths, names, strict=True)]


def _read(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a run directory, with config.json and metrics.jsonl in it")
    config = _object(path / "config.json", "give the directory of a run that has started")
    if not isinstance(config.get("sltrain"), dict):
        raise UserError(f'{path / "config.json"}: has no "sltrain" block, so it is not a run\'s; give a run directory')
    notes = []
    lines = _metrics(path / "metrics.jsonl", notes)
    run = Run(name, path, config, _by_step(lines, "loss"), _by_step(lines, "eval_loss"), notes=notes)
    if not run.steps and not run.evals:
        raise UserError(f"{path / 'metrics.jsonl'}: has no step and no evaluation yet; wait for the run's first step")
    if (path / "baselines.json").is_file():
        found = _object(path / "baselines.json", "delete it, it is computed again")
        run.baselines = {key: float(found[key]) for key in ("unigram", "bigram") if _number(found.get(key))}
    return run


def _object(file: Path, advice: str) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; {advice}") from None
    except ValueError as error:
        raise UserError(f"{file}: not readable JSON ({str(error).splitlines()[0]}); {advice}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object; {advice}")
    return content


def _metrics(file: Path, notes: list[str]) -> list[dict]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give the directory of a run that has started") from None
    rows = text.splitlines()
    found = []
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
            if not (isinstance(line, dict) and type(line["step"]) is int):
                raise ValueError('no object with a whole number under "step"')
        except (ValueError, KeyError) as error:
            if number == len(rows) and not text.endswith("\n"):
                notes.append(f"the last line of {file} is incomplete (a killed run) and is ignored")
                continue
            problem = 'no "step"' if isinstance(error, KeyError) else str(error)
            raise UserError(f"{file}, line {number}: damaged ({problem}); remove the line") from None
        found.append(line)
    return found


def _by_step(lines, key) -> list[dict]:
    """Lines with `key`, one per step, sorted by step; for a repeated step the last one written."""
    kept = {line["step"]: line for line in lines if key in line}
    return [kept[step] for step in sorted(kept)]


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
