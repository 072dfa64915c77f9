"""A run's checkpoints: DeepSpeed's files plus sltrain.json, which is written last and makes them complete."""

import json
import shutil
from pathlib import Path

from deepspeed import comm as dist

from sltrain_ds.errors import UserError
from sltrain_ds.files import write_json, write_text
from sltrain_ds.zero.safe_load import safe_checkpoint_engine
from sltrain_ds.zero.support_check import supports

STATE = "sltrain.json"


def save(engine, run, step: int, tokens: int) -> Path:
    """Write checkpoints/step_XXXXXXXX on all ranks, then drop the oldest beyond `checkpoint.keep`."""
    folder, tag = run.checkpoint_dir, f"step_{step:08d}"
    if dist.get_rank() == 0:
        (folder / tag / STATE).unlink(missing_ok=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step, "tokens": tokens}, save_latest=False)
    held = supports(engine.module)
    dist.barrier()
    if dist.get_rank() == 0:
        state = {
            "format": 1,
            "config": run.to_json(),
            "step": step,
            "tokens": tokens,
            "zero_stage": run.zero_stage,
            "world_size": dist.get_world_size(),
            "supports": held,
        }
        write_json(folder / tag / STATE, state)
        write_text(folder / "latest", tag)
        for old in complete(folder)[: -run.sltrain.checkpoint.keep]:
            shutil.rmtree(old)
    dist.barrier()
    return folder / tag


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first; those a crash cut short are not among them."""
    return sorted(path.parent for path in folder.glob(f"step_*/{STATE}"))


def find(which: str, run) -> Path:
    """The checkpoint that `--resume latest` or `--resume PATH` names; `UserError` where there is none."""
    if which == "latest":
        found = complete(run.checkpoint_dir)
        if not found:
            raise UserError(f"--resume latest: no complete checkpoint in {run.checkpoint_dir}; start without --resume")
        return found[-1]
    path = Path(which)
    if not (path / STATE).is_file():
        found = complete(path)
        if not found:
            raise UserError(f"--resume {which}: no complete checkpoint there (a folder step_* with {STATE} in it)")
        return found[-1]
    return path


def resume(engine, run, path: Path) -> tuple[int, int]:
    """Load weights, optimizer and schedule from `path`; returns (step, tokens) done. Raises `UserError`."""
    state = read_state(path)
    if state["world_size"] != run.world_size:
        raise UserError(
            f"{path}: written by {state['world_size']} ranks, this run has {run.world_size}; ZeRO shards its optimizer "
            f"states by rank, so resume with --num_gpus {state['world_size']}"
        )
    if state["zero_stage"] != run.zero_stage:
        raise UserError(
            f"zero_optimization.stage: {run.zero_stage}, but {path} was written by stage {state['zero_stage']}; "
            f"set it to {state['zero_stage']}"
        )
    for key in ("model", "method", "precision"):
        before, now = state["config"]["sltrain"].get(key), run.to_json()["sltrain"].get(key)
        if _without_lr(before) != _without_lr(now):
            raise UserError(f"sltrain.{key}: differs from the one {path} was trained with ({before}); set it back")
    held = supports(engine.module)
    for name, info in state["supports"].items():
        if held.get(name) != info:
            raise UserError(
                f"{path}: the support of {name} is not the one this version draws ({info}, {held.get(name)})"
            )
    with safe_checkpoint_engine(engine):
        loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise UserError(f"{path}: DeepSpeed found no checkpoint files there; choose another checkpoint")
    return state["step"], state["tokens"]


def read_state(path: Path) -> dict:
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        state["step"], state["tokens"], state["config"]["sltrain"], state["supports"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / STATE}: damaged or not a checkpoint's state ({error!r}); choose another") from None
    return state


def _without_lr(block):
    # a resumed run may change its rates, never its shapes
    return {k: v for k, v in block.items() if k not in ("lr_scale", "activation_checkpointing")} if block else block
