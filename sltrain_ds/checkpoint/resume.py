"""Resumes a run: finds a checkpoint, checks that it fits the config, and loads it."""

import json
from dataclasses import replace
from pathlib import Path

from deepspeed import comm as dist

from sltrain_ds.checkpoint.integrity import check_whole, files_of_rank
from sltrain_ds.checkpoint.reader import find_checkpoint
from sltrain_ds.checkpoint.safe_load import safe_checkpoint_engine
from sltrain_ds.checkpoint.step_folders import STATE_FILE, complete_checkpoints
from sltrain_ds.config import from_dict
from sltrain_ds.config.jsonfile import shown
from sltrain_ds.errors import UserError
from sltrain_ds.methods.supports import supports


def find(which: str, run) -> Path:
    """The checkpoint that `--resume latest` or `--resume PATH` means; `UserError` where none is there or fits."""
    if which != "latest":
        path = find_checkpoint(which).resolve()
    elif found := complete_checkpoints(run.checkpoint_dir):
        path = found[-1].resolve()
    else:
        raise UserError(
            f"--resume latest: no complete checkpoint in {run.checkpoint_dir}; start anew, without --resume and with "
            "--overwrite"
        )
    _check_it_fits(read_state(path), run, path)
    return path


def with_its_modes(run, path: Path | None):
    """The run with the checkpoint's op_mode where the config leaves it to "auto": a resumed run computes as before."""
    asked = run.sltrain.op_mode
    if path is None or (isinstance(asked, str) and asked != "auto"):
        return run
    data = run.to_json()
    before = read_state(path)["config"]["sltrain"].get("op_mode", "auto")
    if isinstance(before, dict) and isinstance(asked, dict):
        before = before | {shape: mode for shape, mode in asked.items() if mode != "auto"}
    data["sltrain"]["op_mode"] = before
    checked = from_dict(data, world_size=run.world_size, name=str(path / STATE_FILE))
    return replace(run, sltrain=run.sltrain.model_copy(update={"op_mode": checked.sltrain.op_mode}))


def resume(engine, run, path: Path) -> tuple[int, int]:
    """Load weights, optimizer and schedule from `path`, which `find` gave; returns (step, tokens) done.

    Rates, betas, eps, weight decay and gradient_clipping are the config's, not the checkpoint's: a resumed run may
    change them.
    """
    state = read_state(path)
    held = supports(engine.module)
    for name, info in state["supports"].items():
        if held.get(name) != info:
            raise UserError(f"{path}: this version draws another support for {name} ({info}, now {held.get(name)})")
    check_whole(files_of_rank(path, run.zero_stage, dist.get_rank()))
    chosen = [dict(group) for group in engine.optimizer.param_groups]
    with safe_checkpoint_engine(engine):
        loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise UserError(f"{path}: DeepSpeed found no checkpoint files there; choose another checkpoint")
    for group, own in zip(engine.optimizer.param_groups, chosen, strict=True):
        group.update({key: own[key] for key in ("lr", "betas", "eps", "weight_decay")})
    if engine.zero_optimization():  # stages 1 and 2 have taken the checkpoint's
        engine.optimizer.clip_grad = engine.gradient_clipping()
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)  # the config's rate at this step
    return state["step"], state["tokens"]


def read_state(path: Path) -> dict:
    """sltrain.json of a checkpoint. Raises `UserError` naming the file where it is damaged."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        for key in ("step", "tokens", "zero_stage", "world_size", "supports"):
            state[key]
        state["config"]["sltrain"], state["config"]["train_batch_size"], state["config"]["optimizer"]["type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / STATE_FILE}: damaged, or not a checkpoint's ({error!r}); choose another") from None
    return state


# what of a block may change from one start to the next; "dir", since data may move
FREE = {"model": ("activation_checkpointing",), "method": ("lr_scale",), "precision": (), "data": ("dir",), "seed": (),
        "per_layer_update": ()}  # fmt: skip
# the layout of the partitions: key -> (stages, default) of DeepSpeed 0.19.8, which may read others as if they fit
LAYOUT = {"round_robin_gradients": ((1, 2), False), "parameter_alignment": ((1, 2), False),
          "sub_group_size": ((3,), 1_000_000_000)}  # fmt: skip


def _check_it_fits(state: dict, run, path: Path) -> None:
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
    before, now = state["config"], run.to_json()
    pairs = {f"sltrain.{key}": [_fixed(c["sltrain"].get(key), FREE[key]) for c in (before, now)] for key in FREE}
    pairs["train_batch_size"] = [c["train_batch_size"] for c in (before, now)]  # the order of the data depends on it
    pairs["optimizer.type"] = [c["optimizer"]["type"] for c in (before, now)]
    for key, (stages, default) in LAYOUT.items():
        if run.zero_stage in stages:
            pairs[f"zero_optimization.{key}"] = [
                c.get("zero_optimization", {}).get(key, default) for c in (before, now)
            ]
    for key, (trained, asked) in pairs.items():
        if trained != asked:
            key, trained, asked = _innermost(key, trained, asked)
            raise UserError(
                f"{key}: {path} was trained with {shown(trained)}, this config says {shown(asked)}; set it back"
            )
    if now.get("scheduler") and not before.get("scheduler"):
        raise UserError(f"scheduler: {path} was trained without one, so none has a place to go on from; remove it")


def _innermost(key, trained, asked):
    """The first key below `key` that differs, and its values."""
    while isinstance(trained, dict) and isinstance(asked, dict):
        name = next(name for name in {**trained, **asked} if trained.get(name) != asked.get(name))
        key, trained, asked = f"{key}.{name}", trained.get(name), asked.get(name)
    return key, trained, asked


def _fixed(value, free):
    return {k: v for k, v in value.items() if k not in free} if isinstance(value, dict) else value
