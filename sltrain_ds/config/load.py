"""JSON file in, `RunConfig` out: parse, override, check keys and types, resolve "auto", check what belongs together."""

import copy
from pathlib import Path

from pydantic import ValidationError

from sltrain_ds.errors import UserError

from . import auto, files, llama, optimizer, refused, shapes
from .batch import BATCH_KEYS, triangle
from .block import block_type
from .deepspeed_keys import DEEPSPEED
from .jsonfile import kind, read_json
from .messages import first_line
from .overrides import apply, whole_tree
from .run import RunConfig
from .tree import check, unknown


def load(path, overrides=(), world_size=1, check_files=True) -> RunConfig:
    """Read the JSON at ``path``, apply ``--set`` strings, and check everything for ``world_size`` ranks.

    ``check_files`` also looks at the tokenizer and data directories (relative to the current directory) and compares
    their vocabularies with the model's. Raises UserError: one line with the key, what is wrong, what would work.
    """
    return from_dict(read_json(path), overrides, world_size, name=str(path), check_files=check_files)


def from_dict(data, overrides=(), world_size=1, name="config.json", check_files=False) -> RunConfig:
    """`load` for an already parsed file; ``name`` stands in for its path (run_dir "auto" takes its stem)."""
    if not isinstance(data, dict):
        raise UserError(f"{name}: the top level must be an object, not {kind(data)}")
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise UserError(f"number of GPUs: must be a whole number from 1 up, not {world_size}")
    data = apply(data, overrides)
    _top_level_keys(data)
    if not isinstance(data.pop("$schema", ""), str):
        raise UserError("$schema: must be a string, the path of sltrain.schema.json; it is for editors alone")
    block = refused.without_removed(data.pop("sltrain"))
    refused.refuse_removed(data)
    data = check(data, DEEPSPEED, "", whole_tree())
    data["optimizer"] = optimizer.check_optimizer(data)
    if "scheduler" in data:
        data["scheduler"] = optimizer.check_scheduler(data)
    block = _typed(block)
    fields = shapes.model_fields(block.model)
    resolved = auto.resolve(data, block.steps, fields)
    block = _resolve_block(block, data, Path(name).stem, resolved)
    refused.refuse_combinations(data, block)
    optimizer.check_schedule(data, block.steps)
    sizes = triangle(data, world_size)
    for key, size in zip(BATCH_KEYS, sizes, strict=True):
        if data.get(key) != size:
            data[key] = resolved[key] = size
    where = (
        f"sltrain.model.path: {Path(block.model.path) / 'config.json'}" if block.model.path else "sltrain.model.config"
    )
    shapes.check_model(fields, where)
    llama.check_values(fields, where, ours=block.model.path is None)
    shapes.check_method(block.method, fields)
    shapes.check_op_mode(block, fields)
    shapes.check_sequence(block.data.sequence_length, fields)
    if check_files:
        files.check_packages(data)
        files.check_files(block, fields)
    return RunConfig(block, data, world_size, *sizes, fields, Path(name), resolved)


def _top_level_keys(data):
    whole = whole_tree()
    for key in data:
        if key not in whole and key not in refused.REMOVED:
            raise UserError(unknown(key, "", whole, whole))
    if "sltrain" not in data:
        raise UserError(
            'sltrain: the block is missing; add "sltrain": {"model": ..., "method": ..., "tokenizer": "DIR", '
            '"data": {"dir": "DIR"}, "steps": N}'
        )
    if not isinstance(data["sltrain"], dict):
        raise UserError(f"sltrain: must be an object {{...}}, not {kind(data['sltrain'])}")


def _typed(block):
    kind = block_type(block)
    try:
        return kind.model_validate(copy.deepcopy(block))
    except ValidationError as error:
        raise UserError(first_line(error, whole_tree(), kind)) from None


def _resolve_block(block, data, stem, resolved):
    """Every "auto" of the block, as a new block."""
    bf16 = data.get("bf16", {}).get("enabled", False)
    precision, run_dir, checkpoint = block.precision, block.run_dir, block.checkpoint

    def fill(path, value, answer):
        if value == "auto":
            resolved[f"sltrain.{path}"] = answer
            return answer
        return value

    run_dir = fill("run_dir", run_dir, f"runs/{stem}")
    backend = fill("precision.backend", precision.backend, "torch" if precision.states == "32bit" else "ours")
    weights = "fp32" if not bf16 else "bf16_stochastic" if backend == "ours" else "fp32_master"
    weights = fill("precision.weights", precision.weights, weights)
    directory = fill("checkpoint.dir", checkpoint.dir, f"{run_dir}/checkpoints")
    changed = {
        "precision": precision.model_copy(update={"weights": weights, "backend": backend}),
        "run_dir": run_dir,
        "checkpoint": checkpoint.model_copy(update={"dir": directory}),
    }
    return block.model_copy(update=changed)
