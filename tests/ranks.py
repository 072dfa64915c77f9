"""Real ranks for the tests, started as a user would start them."""

import os
import subprocess
import sys
from pathlib import Path

from sltrain_ds.ops import builder

ROOT = Path(__file__).resolve().parents[1]


def launch(world: int, *module_and_args: str, cwd: Path, timeout: int = 300, **env) -> subprocess.CompletedProcess:
    """`deepspeed --num_gpus WORLD MODULE_AND_ARGS...` on the CPU, as a user would call it; output captured as text."""
    builder.clear_dead_locks()  # of a test run that was killed while it compiled
    bin_dir = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        **env,
    }
    port = str(20000 + os.getpid() % 20000)
    command = [str(bin_dir / "deepspeed"), "--num_gpus", str(world), "--master_port", port, *map(str, module_and_args)]
    try:
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    finally:
        for left in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):  # DeepSpeed leaves 69 MB a rank in memory
            left.unlink(missing_ok=True)
