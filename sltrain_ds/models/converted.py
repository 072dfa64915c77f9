"""A converted model on disk: a Hugging Face directory whose weights are the method layers' own tensors.

config.json, generation_config.json, tokenizer files   as transformers writes them
model*.safetensors     "...q_proj.A", ".B", ".S_values" and, of supports that no seed gives, ".S_rows", ".S_columns"
sltrain_method.json    {"format": 1, "method": {"name", ...}, "supports": {layer: support_info()}}
"""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sltrain_ds.errors import UserError
from sltrain_ds.files import new_directory, write_json
from sltrain_ds.methods.convert import convert
from sltrain_ds.methods.layer import MethodLinear
from sltrain_ds.methods.registry import get
from sltrain_ds.methods.supports import supports

METHOD_FILE = "sltrain_method.json"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")


def is_converted(path: str | Path) -> bool:
    """Whether `path` is a directory that `save_converted` wrote."""
    return (Path(path) / METHOD_FILE).is_file()


def converted_method(path: str | Path) -> dict:
    """The `sltrain.method` block that the directory was converted with. Raises `UserError` if it is damaged."""
    return _method_file(Path(path))[0]


def save_converted(model: PreTrainedModel, path: str | Path, method: dict, tokenizer: Path | None = None) -> None:
    """Write a converted model to the new directory `path`; `method` is its `sltrain.method` block.

    `tokenizer` is a directory whose tokenizer files are copied along. Raises `UserError` if `path` is not empty.
    """
    with new_directory(path) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        write_json(folder / METHOD_FILE, {"format": 1, "method": method, "supports": supports(model)})


def load_converted(path: str | Path) -> PreTrainedModel:
    """The model of a converted directory on the CPU, in the dtype it was saved in, layers converted.

    Reads JSON and safetensors alone. Raises `UserError` naming the file if one is missing, damaged or does not fit.
    """
    path = Path(path)
    method, noted = _method_file(path)
    model = convert_skeleton(read_config(path), method)
    load_weights(model, _weights(path), path)
    for layer, info in supports(model).items():
        expected = noted.get(layer, {}).get("checksum")
        if info["checksum"] != expected:
            raise UserError(
                f"{path / METHOD_FILE}: support of {layer} has checksum {info['checksum']}, noted was {expected}; "
                "the directory was changed, or written by a version that draws other supports"
            )
    return model


def skeleton(path: str | Path) -> PreTrainedModel:
    """The converted model of such a directory on the meta device."""
    return convert_skeleton(read_config(path), _method_file(Path(path))[0])


def read_config(path: str | Path):
    """The transformers config of a model directory; no code of the directory is run. Raises `UserError`."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a model directory")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise UserError(f"{file}: not a config that transformers knows ({str(error).partition('. ')[0]})") from error


def convert_skeleton(config, method: dict) -> PreTrainedModel:
    """A model of `config` on the meta device, converted by a `sltrain.method` block (but for its lr_scale)."""
    kind = get(method.get("name"))
    known = {field.name for field in fields(kind)}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return convert(model, kind(**{key: value for key, value in method.items() if key in known}))


def load_weights(model: PreTrainedModel, state: dict[str, torch.Tensor], source: Path) -> None:
    """Put `state` into a meta-device model and fill in what is never stored.

    Raises `UserError` naming `source` if it does not fit.
    """
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # shapes
        raise UserError(f"{source}: {str(error).splitlines()[-1].strip()}") from error
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [key for key in missing if key not in tied]
    if missing or unexpected:
        problem = f"lacks {missing[0]}" if missing else f"holds {unexpected[0]}, which the model has no place for"
        raise UserError(f"{source}: {problem} ({len(missing)} missing, {len(unexpected)} unexpected in all)")
    for module in model.modules():
        own = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in own.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if own and not isinstance(module, MethodLinear):  # those draw their supports themselves
            model._init_weights(module)
    model.tie_weights()


def copy_tokenizer(source: str | Path, target: Path) -> list[str]:
    """Copy the tokenizer files of one directory into another; returns their names."""
    found = sorted({file for pattern in TOKENIZER_FILES for file in Path(source).glob(pattern) if file.is_file()})
    for file in found:
        shutil.copyfile(file, target / file.name)
    return [file.name for file in found]


def _method_file(path: Path) -> tuple[dict, dict]:
    file = path / METHOD_FILE
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a directory that `sltrain-ds import` wrote")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != 1:
            raise UserError(f"{file}: format {content['format']} is not 1, the one that this version reads")
        return dict(content["method"]), dict(content["supports"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error})") from error


def _weights(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{path}: holds no model*.safetensors")
    state = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged ({error})") from error
    return state
