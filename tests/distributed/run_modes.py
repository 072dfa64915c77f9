"""A rank's side of a test: each rank would choose another mode; prints what its layers do."""

import json
import sys
from pathlib import Path

from sltrain_ds import models
from sltrain_ds.config import from_dict
from sltrain_ds.ops import modes
from sltrain_ds.zero.agree_on_modes import agree_on_modes
from sltrain_ds.zero.start import start

if __name__ == "__main__":
    start()
    from deepspeed import comm

    rank = comm.get_rank()
    run = from_dict(json.loads(Path(sys.argv[-1]).read_text()), world_size=comm.get_world_size())
    mine = ["factored_dense", "keep"][rank]
    modes.plan = lambda sizes, *_: dict.fromkeys(sizes, mine)
    model = models.build(run)
    run = agree_on_modes(model, run, "cpu")
    print(f"rank {rank}: {sorted(set(modes.chosen(model).values()))} {sorted(run.sltrain.op_mode.items())}", flush=True)
