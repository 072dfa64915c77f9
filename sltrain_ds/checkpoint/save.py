"""A run's checkpoints: DeepSpeed's files plus sltrain.json, which is written last and makes them complete."""

import shutil
from pathlib import Path

from deepspeed import comm as dist

from sltrain_ds.checkpoint.integrity import told_as_one_line
from sltrain_ds.checkpoint.step_folders import STATE_FILE, complete_checkpoints
from sltrain_ds.files import write_json, write_text
from sltrain_ds.methods.supports import supports


def save(engine, run, step: int, tokens: int, callbacks: dict | None = None) -> Path:
    """Write checkpoints/step_NNNNNNNN on all ranks, then drop the oldest beyond `checkpoint.keep`.

    `callbacks` maps a callback's name to its state, JSON values.

    Raises `UserError` where the disk is full; what is there of the folder then is no checkpoint to `--resume latest`.
    """
    folder, tag = run.checkpoint_dir, f"step_{step:08d}"
    if dist.get_rank() == 0:
        (folder / tag / STATE_FILE).unlink(missing_ok=True)
    dist.barrier()
    with told_as_one_line(folder / tag):
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
            "callbacks": callbacks or {},
        }
        write_json(folder / tag / STATE_FILE, state)
        write_text(folder / "latest", tag)
        for old in complete_checkpoints(folder)[: -run.sltrain.checkpoint.keep]:
            (old / STATE_FILE).unlink()  # first, so that one half gone counts as incomplete
            shutil.rmtree(old)
    dist.barrier()
    return folder / tag
