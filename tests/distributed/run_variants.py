"""A rank's side of the tests here: train every config of a file and write the losses.

    run_variants.py CONFIGS.json OUT.json [--resume]     CONFIGS: {name: config}; OUT: {name: [loss a step]}

With --resume each is trained a second time, from a checkpoint of its middle, and OUT holds {name: [straight, resumed]}.
"""

import json
import sys
from pathlib import Path

import deepspeed

from sltrain_ds.checkpoint import resume as checkpoint
from sltrain_ds.checkpoint.save import save
from sltrain_ds.config import from_dict
from sltrain_ds.data.dataset import BatchSource
from sltrain_ds.logs import quiet
from sltrain_ds.models import build as models
from sltrain_ds.models.chunked_loss import use_chunked_loss
from sltrain_ds.training.stepper import Stepper
from sltrain_ds.zero.initialize import initialize, partitioner
from sltrain_ds.zero.start import start


def losses(run, save_at=None, resume_from=None) -> list[float]:
    """Global losses of the run's steps, through the same calls as train.py."""
    source, model = BatchSource(run), models.build(run, "cpu", partitioner(run))
    if run.sltrain.loss == "chunked":
        use_chunked_loss(model)
    engine, *_ = initialize(model=model, config=run)
    first = checkpoint.resume(engine, run, resume_from)[0] if resume_from else 0
    found, stepper = [], Stepper(engine, run, source)
    for step in range(first, run.sltrain.steps):
        result = stepper.step(step)
        found.append(result.loss)
        assert result.grad_norm > 0
        if step + 1 == save_at:
            save(engine, run, step + 1, 0)
    engine.destroy()
    return found


def both(run, folder: Path) -> list[list[float]]:
    middle = run.sltrain.steps // 2
    straight = losses(run, save_at=middle)
    return [straight, straight[:middle] + losses(run, resume_from=folder / f"step_{middle:08d}")]


if __name__ == "__main__":
    quiet()
    config_path, out, *flags = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    start()
    result = {}
    for name, config in json.loads(Path(config_path).read_text()).items():
        config["sltrain"]["checkpoint"]["dir"] = str(Path(out).parent / "checkpoints" / name)
        run = from_dict(config, world_size=deepspeed.comm.get_world_size())
        try:
            result[name] = both(run, run.checkpoint_dir) if "--resume" in flags else losses(run)
        except Exception as error:
            error.add_note(f"in the variant {name}")
            raise
    if deepspeed.comm.get_rank() == 0:
        Path(out).write_text(json.dumps(result))
