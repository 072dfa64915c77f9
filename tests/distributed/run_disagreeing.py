"""A rank's side of a test: each rank draws its supports from another seed."""

import json
import sys
from pathlib import Path

from sltrain_ds.config import from_dict
from sltrain_ds.errors import UserError
from sltrain_ds.models import build as models
from sltrain_ds.zero.initialize import initialize
from sltrain_ds.zero.start import start

if __name__ == "__main__":
    start()
    from deepspeed import comm

    config = json.loads(Path(sys.argv[-1]).read_text())
    config["sltrain"]["method"]["support_seed"] = comm.get_rank()
    run = from_dict(config, world_size=comm.get_world_size())
    try:
        initialize(model=models.build(run), config=run)
    except UserError as error:
        print(error, flush=True)
        sys.exit(2)
