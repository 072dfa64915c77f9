"""A rank's side of a test: each rank would choose another mode; prints what its layers do."""

import json
import sys
from pathlib import Path

from sltrain_ds.config import from_dict
from sltrain_ds.models import build as models
from sltrain_ds.ops import measure_modes, modes
from sltrain_ds.zero.agree_on_modes import agree_on_modes
from sltrain_ds.zero.start import start

if __name__ == "__main__":
    start()
    from deepspeed import comm

    rank = comm.get_rank()
    run = from_dict(json.loads(Path(sys.argv[-1]).read_text()), world_size=comm.get_world_size())
    mine = ["factored_dense", "compose"][rank]

    def measure(layer, names):
        print(f"rank {rank} measures", flush=True)
        return {name: 1.0 if name == mine else 2.0 for name in names}

    measure_modes.measure = measure
    model = models.build(run)
    run = agree_on_modes(model, run, "cpu")
    print(f"rank {rank}: {sorted(set(modes.chosen(model).values()))} {sorted(run.sltrain.op_mode.items())}", flush=True)
