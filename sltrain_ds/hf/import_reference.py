"""Import of checkpoints of the reference SLTrain code as converted model directories with stored supports.

The reference code stores, per replaced linear layer of a transformers model, `lora_A` (r, in), `lora_B` (out, r),
`sparse_value` (nnz,) and `sparse_index` (nnz,) int64, positions in W.flatten(), and computes with

    W = (lora_alpha / r) lora_B lora_A + scatter_add(sparse_value at sparse_index)        W: (out, in)
"""

import json
from collections import defaultdict
from math import inf, nextafter
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sltrain_ds.errors import UserError
from sltrain_ds.methods.layer import MethodLinear
from sltrain_ds.models.converted import TOKENIZER_FILES, convert_skeleton, load_weights, read_config, save_converted
from sltrain_ds.ops import support

_PARTS = ("lora_A", "lora_B", "sparse_value", "sparse_index")
_PREFIXES = ("module.", "_orig_mod.", "wrapped_model.")
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)  # buffers that older transformers saved


def import_sltrain(source: str | Path, out: str | Path, alpha: float | None = None, rank: int | None = None) -> dict:
    """Write the reference checkpoint in `source` to the new directory `out`; returns the method block.

    alpha comes from the JSON files in `source` (lora_alpha) or the argument, the rank from the factors' shapes. All
    values in files (r, lora_r) and arguments must agree. Weights keep their dtype; an unsorted index is sorted together
    with its values. The logits equal those of the formula. Raises `UserError`.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source}: no such directory")
    file, state = _read_weights(source)
    layers, state = _split(state, file)
    rank = _agreed("rank", rank, source, ("r", "lora_r"), int(next(iter(layers.values()))["lora_A"].shape[0]))
    alpha = _agreed("alpha", alpha, source, ("lora_alpha",))
    if alpha is None:
        raise UserError(f"{source}: no JSON file in it has lora_alpha; give --alpha")
    config = read_config(source)
    shapes = _linear_shapes(config)
    for name, parts in layers.items():
        rows, columns, order = _check(name, parts, rank, shapes.get(name), file)
        state[f"{name}.S_rows"], state[f"{name}.S_columns"] = rows, columns  # marks the layer's support as stored
        state[f"{name}.A"], state[f"{name}.B"] = parts["lora_A"].contiguous(), parts["lora_B"].contiguous()
        state[f"{name}.S_values"] = parts["sparse_value"].flatten()[order]
    method = {"name": "sltrain", "rank": rank, "density": _density(layers, file), "alpha": alpha, "support_seed": 0}
    method["target_modules"] = _targets(config, method, set(layers))
    model = convert_skeleton(config, method)
    load_weights(model, state, file)
    save_converted(model, out, method, tokenizer=source)
    return method


def _read_weights(source: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = source / name
        if file.is_file():
            break
    else:
        raise UserError(f"{source}: holds neither model.safetensors nor pytorch_model.bin")
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(f"{file}: refused or damaged: only tensors are read from a pickle ({_first(error)})") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{file}: damaged ({_first(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{file}: is not a state dict (parameter names to tensors)")
    return file, {_unwrapped(name): tensor.detach() for name, tensor in state.items()}


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line] or str(error).splitlines()
    return lines[0].partition(". ")[0] if lines else type(error).__name__


def _unwrapped(name: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _split(state: dict, file: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Split a state dict into the sparse layers' parts, by layer name, and all other tensors."""
    layers, rest = defaultdict(dict), {}
    for key, tensor in state.items():
        name, _, part = key.rpartition(".")
        if part in _PARTS:
            layers[name][part] = tensor
        elif not key.endswith(_NOT_WEIGHTS):
            rest[key] = tensor
    if not layers:
        raise UserError(f"{file}: holds no {', '.join(_PARTS)}; not a checkpoint of the SLTrain code")
    for name, parts in layers.items():
        lacking = [part for part in _PARTS if part not in parts]
        if lacking:
            raise UserError(f"{file}: {name} lacks {', '.join(lacking)}; not a checkpoint of the SLTrain code")
        if f"{name}.weight" in rest:
            raise UserError(f"{file}: {name} has a dense weight beside its factors, which is not in the formula")
    return dict(layers), rest


def _agreed(what: str, given, source: Path, keys: tuple[str, ...], found=None):
    """The value on which the flag, the weights and the directory's JSON files must agree; None if none has it."""
    said = {f"--{what}": given, "the weights": found}
    tokenizer = {file for pattern in TOKENIZER_FILES for file in source.glob(pattern)}  # may contain a token named r
    for file in sorted({*source.glob("*.json")} - tokenizer):
        content = _json(file)
        blocks = [content, *content.values()] if isinstance(content, dict) else []
        for block in (block for block in blocks if isinstance(block, dict)):
            said |= {f"{file.name} ({key})": block[key] for key in keys if type(block.get(key)) in (int, float)}
    said = {place: value for place, value in said.items() if value is not None}
    if len(set(said.values())) > 1:
        raise UserError(f"{source}: {what} is " + ", ".join(f"{value} by {place}" for place, value in said.items()))
    return next(iter(said.values()), None)


def _json(file: Path):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error


def _linear_shapes(config) -> dict[str, tuple[int, int]]:
    dense = convert_skeleton(config, {"name": "full_rank"})
    return {name: tuple(m.weight.shape) for name, m in dense.named_modules() if isinstance(m, torch.nn.Linear)}


def _check(name: str, parts: dict[str, torch.Tensor], rank: int, shape: tuple[int, int] | None, file: Path):
    """Check that a layer's tensors fit the model; returns (rows, columns, permutation of the values)."""
    if shape is None:
        raise UserError(f"{file}: the model of config.json has no linear layer {name}")
    A, B, values, index = (parts[part] for part in _PARTS)
    if tuple(A.shape) != (rank, shape[1]) or tuple(B.shape) != (shape[0], rank):
        found = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}"
        raise UserError(f"{file}: {name} has {found}; expected {(rank, shape[1])} and {(shape[0], rank)}")
    if index.dtype != torch.int64 or index.numel() != values.numel():
        raise UserError(
            f"{file}: {name} has {values.numel()} values and {index.numel()} positions in {index.dtype}; "
            "expected equal numbers, positions in int64"
        )
    try:
        return support.from_flat_index(index, *shape)
    except UserError as error:
        raise UserError(f"{file}: {name}: {error}") from error


def _density(layers: dict, file: Path) -> float:
    """The density with the fewest digits that gives every layer its number of values; the file does not store it."""
    low, high = 0.0, inf
    for parts in layers.values():
        size = parts["lora_B"].shape[0] * parts["lora_A"].shape[1]
        low = max(low, parts["sparse_value"].numel() / size)
        high = min(high, (parts["sparse_value"].numel() + 1) / size)

    def fits(density):
        return 0 < density <= 1 and all(
            support.nnz_of(density, parts["lora_B"].shape[0], parts["lora_A"].shape[1]) == parts["sparse_value"].numel()
            for parts in layers.values()
        )

    candidates = [round((low + high) / 2, digits) for digits in range(1, 17)] + [low, nextafter(low, inf)]
    found = next((density for density in candidates if fits(density)), None)
    if found is None:
        raise UserError(f"{file}: its layers have different densities of non-zeros; they must have one density")
    return found


def _targets(config, method: dict, layers: set[str]) -> list[str]:
    """The shortest list of name components for which `convert` replaces exactly `layers`."""
    for targets in (["self_attn", "mlp"], sorted({name.rpartition(".")[2] for name in layers})):
        try:
            model = convert_skeleton(config, {**method, "target_modules": targets})
        except UserError:
            continue  # these parts do not name the layers of this architecture
        if {name for name, module in model.named_modules() if isinstance(module, MethodLinear)} == layers:
            return targets
    return sorted(layers)
