"""Export of a run's checkpoint as a plain dense Hugging Face model, one layer at a time."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from sltrain_ds.checkpoint.integrity import check_whole, files_with_weights
from sltrain_ds.checkpoint.reader import Checkpoint, open_checkpoint
from sltrain_ds.checkpoint.step_folders import STATE_FILE
from sltrain_ds.config.block import Model
from sltrain_ds.errors import UserError
from sltrain_ds.files import new_directory, write_json
from sltrain_ds.methods.layer import MethodLinear
from sltrain_ds.methods.supports import supports
from sltrain_ds.models.build import model_config
from sltrain_ds.models.converted import convert_skeleton, copy_tokenizer, is_converted, read_config
from sltrain_ds.models.converted import skeleton as converted_skeleton

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Exported:
    """Result of an export; `tokenizer` is the directory the tokenizer files were copied from, None without any."""

    step: int
    parameters: int
    bytes: int
    files: int
    dtype: torch.dtype
    tokenizer: Path | None


@dataclass(frozen=True)
class Entry:
    """One tensor of the dense model; `read` returns it in its final dtype."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def export(source: str | Path, out: str | Path, dtype: str = "auto", shard_bytes: int = 10**9) -> Exported:
    """Write the checkpoint `source` to the new directory `out`, in the format of `AutoModelForCausalLM`.

    Replaced layers are built one at a time, merged by `dense_weight()` and dropped; at most one file of `shard_bytes`
    is resident. dtype "auto" is the compute dtype of the run and reproduces its loss; for another one, the merge uses
    the wider of the two. Raises `UserError` if the checkpoint is incomplete, damaged or does not match its config, if
    a support differs from the trained one, or if `out` is not empty.
    """
    checkpoint = open_checkpoint(source)
    check_whole(files_with_weights(checkpoint.dir))
    block = checkpoint.config.get("sltrain", {})
    target = _dtype(dtype, checkpoint)
    model = _skeleton(block, checkpoint)
    _check_names(model, checkpoint)
    shards = list(_shards(_entries(model, checkpoint, target), shard_bytes // target.itemsize))
    with new_directory(out) as folder:
        total = _write_shards(shards, folder)
        model.config.update({"architectures": [type(model).__name__], "dtype": target, "use_cache": True})
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer = Path(block.get("tokenizer", ""))
        copied = copy_tokenizer(tokenizer, folder)
    parameters = sum(torch.Size(entry.shape).numel() for shard in shards for entry in shard)
    return Exported(checkpoint.step, parameters, total, len(shards), target, tokenizer if copied else None)


def _dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    if name == "auto":
        return checkpoint.dtype(checkpoint.names()[0])
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: not known; choose auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def _skeleton(block: dict, checkpoint: Checkpoint) -> nn.Module:
    """The run's converted model on the meta device."""
    try:
        chosen = Model.model_validate(block["model"])
        if chosen.path is None:
            return convert_skeleton(model_config(chosen), block["method"])
        if not Path(chosen.path).is_dir():
            raise UserError(f"sltrain.model.path: {chosen.path}, which the run started from, is missing; restore it")
        if is_converted(chosen.path):
            return converted_skeleton(chosen.path)
        return convert_skeleton(read_config(chosen.path), block["method"])
    except (KeyError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint.dir / STATE_FILE}: its config describes no model ({reason})") from error


def _check_names(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Check that the checkpoint has exactly the model's parameters, in their shapes."""
    wanted = dict(model.named_parameters())
    for name, parameter in wanted.items():
        if checkpoint.shape(name) != parameter.shape:
            shapes = f"{tuple(checkpoint.shape(name))}, not {tuple(parameter.shape)}"
            raise UserError(f"{checkpoint.dir}: {name} is {shapes} as in its config; they do not belong together")
    extra = [name for name in checkpoint.names() if name not in wanted]
    if extra:
        raise UserError(f"{checkpoint.dir}: holds {extra[0]}, which is not in its config's model")


def _entries(model: nn.Module, checkpoint: Checkpoint, target: torch.dtype) -> Iterator[Entry]:
    """Tensors of the dense model in order; tied tensors once."""
    done = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, MethodLinear):
            shape = (module.out_features, module.in_features)
            yield Entry(f"{prefix}weight", shape, partial(_merged, checkpoint, name, module, target))
            own = {key: parameter for key, parameter in own.items() if key == "bias"}
        else:
            own |= _persistent_buffers(module)
        for key, tensor in own.items():
            if id(tensor) not in done:
                done.add(id(tensor))
                full = f"{prefix}{key}"
                yield Entry(full, tuple(tensor.shape), partial(_copied, checkpoint, full, target))


def _persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    skipped = module._non_persistent_buffers_set
    return {key: buffer for key, buffer in module.named_buffers(recurse=False) if key not in skipped}


def _copied(checkpoint: Checkpoint, name: str, target: torch.dtype) -> torch.Tensor:
    tensor = checkpoint.tensor(name)
    return tensor.to(target) if tensor.is_floating_point() else tensor


def _merged(checkpoint: Checkpoint, name: str, layer: MethodLinear, target: torch.dtype) -> torch.Tensor:
    """W (out, in) of one layer, from the checkpoint's tensors and the support it was trained on."""
    keys = [key for key, _ in layer.named_parameters()]
    keys += [key.removeprefix(f"{name}.") for key in checkpoint.buffer_names() if key.startswith(f"{name}.")]
    state = {key: checkpoint.tensor(f"{name}.{key}") for key in keys}
    for key, tensor in state.items():
        if tensor.is_floating_point():
            state[key] = tensor.to(torch.promote_types(tensor.dtype, target))
    built = copy.deepcopy(layer).to_empty(device="cpu")
    built.load_state_dict(state, assign=True)
    for layer_name, info in supports(built).items():
        noted = checkpoint.supports.get(layer_name, {}).get("checksum")
        if info["checksum"] != noted:
            raise UserError(
                f"{checkpoint.dir / STATE_FILE}: support of {layer_name} has checksum {noted}, drawn was "
                f"{info['checksum']}; export with the version of sltrain_ds that trained it"
            )
    return built.dense_weight().to(target)


def _shards(entries: Iterator[Entry], limit: int) -> Iterator[list[Entry]]:
    """Groups of consecutive entries with at most `limit` elements, or a single larger entry."""
    shard, size = [], 0
    for entry in entries:
        numel = torch.Size(entry.shape).numel()
        if shard and size + numel > limit:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += numel
    yield shard


def _write_shards(shards: list[list[Entry]], folder: Path) -> int:
    """Write model.safetensors, or numbered files and an index, in transformers' layout; returns the tensors' bytes."""
    total, where = 0, {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(shard, folder / file)
        where |= {entry.name: file for entry in shard}
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return total


def _write_shard(shard: list[Entry], file: Path) -> int:
    tensors = {entry.name: entry.read().contiguous() for entry in shard}
    save_file(tensors, file, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())
