"""Memory benchmark: peaks of real steps in fresh processes, compared with the estimate and the paper's figure.

First a waterfall: the recipe without any of its memory savings, then one saving added per row, up to the full recipe.
Then the methods of the paper's Figure 3 with the same savings. A row is *run* if it fits, else *estimated*.
"""

import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from sltrain_ds.bench.report import Report
from sltrain_ds.bench.step import free_bytes
from sltrain_ds.config import from_dict
from sltrain_ds.config.jsonfile import read_json
from sltrain_ds.config.overrides import apply
from sltrain_ds.errors import UserError
from sltrain_ds.memory.count import Shape, count
from sltrain_ds.memory.estimate import estimate
from sltrain_ds.memory.galore import galore_bytes
from sltrain_ds.memory.paper import FIGURE_3

COLUMNS = ["row", "how", "peak GB", "tensors GB", "estimate GB", "off %", "paper GB", "s a step", "tokens"]
ROOM = 0.9  # fraction of the free memory that a row may use
PROCESS = {"cpu": 0.6e9, "cuda": 0.0}  # Python and libraries: in the resident set size, not in the estimate

_PLAIN = {
    "sltrain.per_layer_update": False, "sltrain.clipping": "global", "sltrain.loss": "full",
    "sltrain.model.activation_checkpointing": "none",
}  # fmt: skip


@dataclass
class Row:
    """`keys`: config overrides; `naive`: use the operator with int64 indices and saved copies of A; `extra`: bytes
    that the estimate does not count; `paper`: key in FIGURE_3; `runs`: whether the row can be run."""

    name: str
    keys: dict = field(default_factory=dict)
    naive: bool = False
    extra: int = 0
    paper: str | None = None
    runs: bool = True


def bench(path, overrides, steps: int, device: str, rows: str = "all", out=None) -> list[dict]:
    """Print and return the cases. `rows`: "all" runs what fits, "own" only the recipe; the rest is estimated."""
    data = apply(read_json(path), overrides)
    own = from_dict(data, name=str(path))
    if own.sltrain.method.name != "sltrain":
        raise UserError(f"sltrain.method.name: {path} holds {own.sltrain.method.name!r}; bench memory takes sltrain")
    report = Report("memory", COLUMNS, device, out)
    for row in [*waterfall(own), *contenders(own)]:
        case = measure(path, data, row, steps, device, run_it=rows == "all" or not row.keys)
        report.add(case, [table_row(case)])
    return report.cases


def waterfall(own) -> list[Row]:
    """Rows from no savings to the full recipe, one saving per row; savings that the recipe does not use are omitted."""
    model = count(Shape.of(own.model_fields), own.sltrain.method)
    index = sum(8 * support.nnz - support.bytes for support in model.supports)
    copies = sum(t.numel for t in model.tensors if t.name.endswith(".A")) * (2 if own.bf16 else 4)
    masters = {"sltrain.precision.weights": "fp32_master" if own.bf16 else "fp32"}
    keys = _PLAIN | masters | {"zero_optimization.reduce_bucket_size": max(t.numel for t in model.tensors)}
    found = [
        Row("nothing saved: int64 index, copies of A", dict(keys), naive=True, extra=index + copies),
        Row("- index row-wise, uint16", dict(keys), extra=copies, runs=False),
        Row("- no saved copies of A", dict(keys)),
    ]
    block = own.sltrain
    savings = [
        ("- activation checkpointing", "sltrain.model.activation_checkpointing", block.model.activation_checkpointing),
        ("- loss in chunks", "sltrain.loss", block.loss),
        ("- no fp32 masters", "sltrain.precision.weights", block.precision.weights),
    ]
    for name, key, value in savings:
        if keys[key] != value:
            keys[key] = value
            found.append(Row(name, dict(keys)))
    name = "- gradients layer by layer" if block.per_layer_update else "the recipe"
    return [*found, Row(f"{name} (the recipe)".replace("the recipe (the recipe)", "the recipe"), paper="sltrain")]


def contenders(own) -> list[Row]:
    """Rows of the paper's other methods with all of the recipe's savings."""
    full = {"sltrain.method": {"name": "full_rank"}}
    return [
        Row("full-rank Adam, 32-bit states", full | _states("32bit", "bf16" if own.bf16 else "fp32"), paper="adam"),
        Row("full-rank Adam, 8-bit states", full | {"sltrain.precision": own.sltrain.precision.model_dump()},
            paper="adam_8bit"),
        Row("GaLore, 8-bit states", full, paper="galore", runs=False),
    ]  # fmt: skip


def _states(states, weights):
    return {"sltrain.precision": {"states": states, "weights": weights}}


def variant(path, data: dict, row: Row):
    """A row's config as (dict, `RunConfig`)."""
    data = copy.deepcopy(data)
    for key, value in row.keys.items():
        *parents, last = key.split(".")
        node = data
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return data, from_dict(data, name=str(path))


def measure(path, data: dict, row: Row, steps: int, device: str, run_it: bool = True) -> dict:
    """One case: {"row", "how", "estimate" (tensor bytes), "measured" (`memory_run.measure`'s, or None), "paper"}."""
    config, run = variant(path, data, row)
    expected = estimate(run, 1)
    need = expected.peak + row.extra
    if row.paper == "galore":
        need += galore_bytes(run, Shape.of(run.model_fields)) - expected.bytes["states"]
    paper = FIGURE_3.get(run.sltrain.model.preset, {}).get(row.paper)
    case = {"row": row.name, "keys": row.keys, "estimate": need, "paper": paper, "how": "estimated", "measured": None}
    room = max(0.0, ROOM * free_bytes(device) - PROCESS[device.split(":")[0]])
    if row.runs and run_it and need <= room:
        job = {"config": config, "name": str(path), "steps": steps, "device": device, "naive": row.naive}
        case |= {"how": "run", "measured": in_a_fresh_process(job)}
    elif row.runs and run_it:
        case["how"] = f"estimated: {room / 1e9:.1f} GB free"
    return case


def in_a_fresh_process(job: dict) -> dict:
    """Run one row in its own process, so that no other row affects its peak. `UserError` with its last line if it
    fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "sltrain_ds.bench.memory_run", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"bench memory: a row's process exited with code {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table_row(case: dict) -> list:
    found, expected = case["measured"], case["estimate"]
    if found is None:
        return [case["row"], case["how"], None, None, expected / 1e9, None, case["paper"], None, "-"]
    sizes = found["bytes"]
    off = 100.0 * (expected / sizes["tensors"] - 1)
    return [
        case["row"], case["how"], sizes["peak"] / 1e9, sizes["tensors"] / 1e9, expected / 1e9, off, case["paper"],
        found["seconds"], found["tokens"],
    ]  # fmt: skip
