"""Trained weights of a run, one matrix at a time: W, and for layers that have them, the low-rank part and S.

They are read from a run's newest complete checkpoint, else from its export/, or from a model directory, converted (see
models/converted.py) or plain Hugging Face. Only the requested matrix is resident.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sltrain_ds.errors import UserError


class Layer(NamedTuple):
    """A weight matrix (out, in) as float32, W = low_rank + sparse; None if the layer has no such part."""

    name: str
    W: np.ndarray
    low_rank: np.ndarray | None
    sparse: np.ndarray | None


@dataclass(frozen=True)
class Weights:
    """`shapes`: dotted layer name -> (out, in), in the model's order; `ranks` likewise, None for dense layers."""

    source: Path
    shapes: dict[str, tuple[int, int]]
    ranks: dict[str, int | None]
    read: Callable[[str], Layer]


def layers(run_dir: str | Path) -> Iterator[Layer]:
    """Yield every weight matrix of the trained model except embedding and head. `UserError` if there are none."""
    weights, _ = open_weights(run_dir)
    if weights is None:
        raise UserError(f"{run_dir}: holds neither a checkpoint nor an export; give the directory of a saved run")
    for name in weights.shapes:
        yield weights.read(name)


def open_weights(run_dir: str | Path) -> tuple[Weights | None, list[str]]:
    """Open the weights of a run (None if it saved none); also returns notes on unreadable ones."""
    run_dir, notes = Path(run_dir), []
    for folder, reader in (
        (run_dir / "checkpoints", _checkpoint),
        (_configured_checkpoints(run_dir), _checkpoint),
        (run_dir / "export", _directory),
        (run_dir, _directory),
    ):
        if folder is not None and folder.is_dir() and (reader is _checkpoint or any(folder.glob("model*.safetensors"))):
            try:
                return reader(folder), notes
            except UserError as error:
                notes.append(f"weights not read from {folder}: {error}")
    return None, notes


def _configured_checkpoints(run_dir: Path) -> Path | None:
    """Checkpoint directory from the run's config, if outside the run directory."""
    try:
        folder = Path(json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["sltrain"]["checkpoint"]["dir"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a model directory, or a config without the key
    return None if str(folder) == "auto" or folder.resolve() == (run_dir / "checkpoints").resolve() else folder


def _checkpoint(folder: Path) -> Weights:
    from pydantic import ValidationError

    from sltrain_ds.checkpoint.reader import open_checkpoint
    from sltrain_ds.config.block import Model
    from sltrain_ds.models.build import model_config
    from sltrain_ds.models.converted import convert_skeleton, is_converted, read_config, skeleton

    checkpoint = open_checkpoint(folder)
    block = checkpoint.config["sltrain"]
    try:
        chosen = Model.model_validate(block["model"])
    except (KeyError, ValidationError) as error:
        raise UserError(f"{checkpoint.dir}: its config names no model ({str(error).splitlines()[0]})") from None
    if chosen.path is None:
        model = convert_skeleton(model_config(chosen), block["method"])
    elif is_converted(chosen.path):
        model = skeleton(chosen.path)
    else:
        model = convert_skeleton(read_config(chosen.path), block["method"])
    return _weights(checkpoint.dir, model, checkpoint.tensor, set(checkpoint.buffer_names()))


def _directory(folder: Path) -> Weights:
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM

    from sltrain_ds.models.converted import is_converted, read_config, skeleton

    where = {}
    try:
        for file in sorted(folder.glob("model*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                where |= dict.fromkeys(tensors.keys(), file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged ({error}); export it again") from None
    if is_converted(folder):
        model = skeleton(folder)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(read_config(folder), trust_remote_code=False)

    def tensor(name):
        if name not in where:
            raise UserError(f"{folder}: has no tensor {name}; its files do not belong to its config.json")
        with safe_open(where[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    return _weights(folder, model, tensor, set(where))


def _weights(source, model, tensor, buffers) -> Weights:
    """Build `Weights`. `tensor(name)` reads a tensor; `buffers`: names of stored buffers, incl. stored supports."""
    from torch import nn

    from sltrain_ds.methods.layer import MethodLinear

    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MethodLinear) or (isinstance(module, nn.Linear) and module is not head)
    }

    def read(name):
        module = found[name]
        if not isinstance(module, MethodLinear):
            return Layer(name, tensor(f"{name}.weight").float().numpy(), None, None)
        keys = [key for key, _ in module.named_parameters()]
        keys += [key for key, _ in module.named_buffers() if f"{name}.{key}" in buffers]
        state = {key: tensor(f"{name}.{key}") for key in keys}
        state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        layer = copy.deepcopy(module).to_empty(device="cpu")
        try:
            layer.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise UserError(f"{source}: {name}: {str(error).splitlines()[-1].strip()}") from None
        W, S = layer.dense_weight().numpy(), layer.dense_sparse()
        return Layer(name, W, W if S is None else W - S.numpy(), None if S is None else S.numpy())

    return Weights(
        source,
        {name: (module.out_features, module.in_features) for name, module in found.items()},
        {name: getattr(module, "rank", None) for name, module in found.items()},
        read,
    )
