"""Plain `deepspeed.initialize` takes every shipped file as it is: no "sltrain" awareness, no op to build."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sltrain_ds.config import load
from sltrain_ds.ops.builder import clear_dead_locks

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.json"))

WORKER = """
import json, socket, sys
from pathlib import Path
import os
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
import torch, deepspeed
seen = {}
for path in map(Path, sys.argv[1:]):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=str(path)
    )
    loss = engine(torch.ones(4, 8, dtype=torch.bfloat16)).float().mean()
    engine.backward(loss)
    engine.step()
    seen[path.stem] = {
        "batch": [
            engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
        ],
        "stage": engine.zero_optimization_stage(),
        "clipping": engine.gradient_clipping(),
        "optimizer": type(engine.basic_optimizer).__module__ + "." + type(engine.basic_optimizer).__name__,
        "scheduler": type(scheduler).__name__,
        "bf16": engine.bfloat16_enabled(),
        "loss": float(loss),
    }
    engine.destroy()
print("SEEN " + json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen():
    """What one process's engines say, a file each. A first start builds DeepSpeed's CPU communication op (a minute)."""
    clear_dead_locks()  # what a killed build left, on which DeepSpeed would wait without end
    bin_dir = Path(sys.executable).parent
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-c", WORKER, *(str(FOLDER / f"{name}.json") for name in SHIPPED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert done.returncode == 0 and lines, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("SEEN "))


@pytest.mark.parametrize("name", SHIPPED)
def test_taken_as_it_is(seen, name):
    engine, run = seen[name], load(FOLDER / f"{name}.json", check_files=False)
    assert engine["batch"] == [run.train_batch_size, run.micro_batch_size, run.accumulation]
    assert engine["stage"] == run.zero_stage and engine["clipping"] == run.gradient_clipping and engine["bf16"] is True
    assert engine["optimizer"] == "torch.optim.adamw.AdamW" and engine["scheduler"] == "WarmupCosineLR"
    assert engine["loss"] == engine["loss"]
