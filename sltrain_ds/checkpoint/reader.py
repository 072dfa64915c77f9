"""Reads single parameters out of a DeepSpeed checkpoint of stage 0 to 3, without an engine and without unpickling."""

import json
import math
from functools import cached_property
from pathlib import Path

import torch

from sltrain_ds.checkpoint.safe_load import load
from sltrain_ds.checkpoint.step_folders import STATE_FILE, complete_checkpoints
from sltrain_ds.errors import UserError


def find_checkpoint(path: str | Path) -> Path:
    """The complete step folder that `path` means: itself, or the latest of a checkpoints folder or run directory.

    Raises `UserError` if there is none, or if the one meant is incomplete.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a run directory, its checkpoints folder or one step in it")
    if (path / STATE_FILE).is_file():
        return path
    if any(path.glob("*_states.pt")):
        raise UserError(f"{path}: incomplete, it has no {STATE_FILE}, which is written last{_hint(path.parent)}")
    folder = path if (path / "latest").is_file() else path / "checkpoints"
    if not (folder / "latest").is_file():
        raise UserError(
            f"{path}: not a checkpoint, it holds neither {STATE_FILE} nor latest nor checkpoints/latest{_hint(path)}"
        )
    step = folder / Path((folder / "latest").read_text().strip()).name
    if not (step / STATE_FILE).is_file():
        raise UserError(f"{step}: incomplete, it has no {STATE_FILE}, which is written last{_hint(folder)}")
    return step


def _hint(folder: Path) -> str:
    complete = complete_checkpoints(folder)
    return f"; the newest complete is {complete[-1]}" if complete else ""


def open_checkpoint(path: str | Path) -> "Checkpoint":
    """The checkpoint that `path` means (see `find_checkpoint`). Raises `UserError` if it cannot be read."""
    folder = find_checkpoint(path)
    file = folder / STATE_FILE
    try:
        state = json.loads(file.read_text())
        if state["format"] != 1:
            raise UserError(f"{file}: format {state['format']} is not 1, the one that this version reads")
        stage = int(state["zero_stage"])
        weights = (_Partitioned if stage == 3 else _Whole)(folder, int(state["world_size"]))
        return Checkpoint(folder, state["config"], int(state["step"]), state["supports"], weights)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error})") from error


class Checkpoint:
    """One step's checkpoint. Nothing of it is resident but what `tensor` hands out.

    dir       the step folder
    config    the run's resolved configuration, as in its config.json
    step      optimizer steps taken
    supports  layer name -> what the method noted of its support
    """

    def __init__(self, folder: Path, config: dict, step: int, supports: dict, weights):
        self.dir, self.config, self.step, self.supports, self._weights = folder, config, step, supports, weights

    def names(self) -> list[str]:
        """Parameter names in the order of `model.named_parameters()`: of tied ones the first, frozen ones too."""
        return self._weights.names

    def buffer_names(self) -> list[str]:
        """Names of the persistent buffers."""
        return self._weights.buffer_names

    def shape(self, name: str) -> torch.Size:
        """Shape of a parameter or buffer, also by a tied name."""
        return self._known(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """dtype of what `tensor` returns."""
        return self._known(name).dtype(name)

    def tensor(self, name: str) -> torch.Tensor:
        """One parameter or buffer, also by a tied name: a CPU tensor of its own.

        The value is the one that the model computed with: bf16 under bf16, not DeepSpeed's fp32 master (at stage 3
        the master is what is stored, rounded here as the engine rounds it). So a merged model gives the run's loss.
        """
        return self._known(name).tensor(name)

    def _known(self, name):
        if name not in self._weights.all_names:
            raise UserError(f"{self.dir}: holds no parameter or buffer {name}; was it written from another model?")
        return self._weights


class _Files:
    """Memory-mapped files, let go after every `budget` bytes read so that their pages do not pile up as resident."""

    def __init__(self, budget: int = 1 << 28):
        self.budget, self._read, self._open = budget, 0, {}

    def __getitem__(self, path: Path) -> dict:
        if path not in self._open:
            content = load(path, mmap=True)
            if not isinstance(content, dict) or not {"module", "optimizer_state_dict"} & set(content):
                raise UserError(f"{path}: not a DeepSpeed checkpoint file: no module, no optimizer_state_dict")
            self._open[path] = content
        return self._open[path]

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        self._read += tensor.nbytes
        if self._read > self.budget:
            self._read = 0
            self._open.clear()
        return tensor


class _Whole:
    """Stages 0 to 2: one file holds every weight whole, in the dtype it is computed with."""

    def __init__(self, folder: Path, world_size: int):
        self._path = folder / "mp_rank_00_model_states.pt"
        self._files = _Files()

    @property
    def _module(self) -> dict[str, torch.Tensor]:
        return self._files[self._path]["module"]

    @cached_property
    def all_names(self) -> list[str]:
        return list(self._module)

    @cached_property
    def buffer_names(self) -> list[str]:
        return list(self._files[self._path]["buffer_names"])

    @cached_property
    def names(self) -> list[str]:
        buffers, seen, names = set(self.buffer_names), set(), []
        for name, tensor in self._module.items():
            # tied weights are saved as one storage; empty tensors all look alike
            key = (tensor.data_ptr(), tensor.shape) if tensor.numel() else name
            if name not in buffers and key not in seen:
                seen.add(key)
                names.append(name)
        return names

    def shape(self, name):
        return self._module[name].shape

    def dtype(self, name):
        return self._module[name].dtype

    def tensor(self, name):
        return self._files.count(self._module[name].detach().clone(memory_format=torch.contiguous_format))


class _Partitioned:
    """Stage 3: every rank holds an equal slice of every flattened parameter; the end is padded.

    The optimizer file holds trained parameters as masters, sub-group by sub-group, one after another in the order of
    `param_shapes`; the model file holds frozen ones as fragments, the buffers, and the dtype
    of each parameter. See `zero3_partitioned_param_info` and `_zero3_merge_*` in DeepSpeed 0.19.8,
    `utils/zero_to_fp32.py`.
    """

    def __init__(self, folder: Path, world_size: int):
        self._folder, self._world = folder, world_size
        self._files = _Files()

    def _model_file(self, rank: int = 0) -> dict:
        return self._files[self._folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"]

    def _optimizer_file(self, rank: int) -> dict:
        path = self._folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        if not path.exists():
            path = path.with_name("bf16_" + path.name)
        return self._files[path]["optimizer_state_dict"]

    def _masters(self, rank: int, group: int) -> torch.Tensor:
        return self._optimizer_file(rank)["fp32_flat_groups"][group]

    @cached_property
    def _alignment(self) -> int:
        """Of slices in values: what `zero/aligned.py` writes, 1 for DeepSpeed's own."""
        return self._optimizer_file(0).get("partition_alignment", 1) if self._world > 1 else 1

    @cached_property
    def _shared(self) -> dict[str, str]:
        return dict(self._model_file()["shared_params"])

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self._model_file()["module"].items()}

    @cached_property
    def _trained(self) -> dict[str, tuple[torch.Size, int, int]]:
        """name -> (shape, sub-group, where its slice begins in every rank's flat sub-group)"""
        found = {}
        for group, shapes in enumerate(self._model_file()["param_shapes"]):
            offset = 0
            for name, shape in shapes.items():
                found[name] = shape, group, offset
                offset += self._slice(shape)
        return found

    @cached_property
    def _frozen(self) -> dict[str, torch.Size]:
        return dict(self._model_file()["frozen_param_shapes"] or {})

    def _slice(self, shape: torch.Size) -> int:
        return math.ceil(math.prod(shape) / (self._world * self._alignment)) * self._alignment

    @cached_property
    def all_names(self) -> list[str]:
        return list(self._dtypes)

    @cached_property
    def buffer_names(self) -> list[str]:
        return list(self._model_file()["buffer_names"])

    @cached_property
    def names(self) -> list[str]:
        other = {*self.buffer_names, *self._shared}
        return [name for name in self.all_names if name not in other]

    def shape(self, name):
        name = self._shared.get(name, name)
        if name in self._trained:
            return self._trained[name][0]
        return self._frozen[name] if name in self._frozen else self._model_file()["module"][name].shape

    def dtype(self, name):
        return self._dtypes[name]

    def tensor(self, name):
        name = self._shared.get(name, name)
        shape = self.shape(name)
        if name in self._trained:
            _, group, offset = self._trained[name]
            slices = (self._masters(rank, group)[offset:] for rank in range(self._world))
        elif name in self._frozen:
            slices = (self._model_file(rank)["frozen_param_fragments"][name].flatten() for rank in range(self._world))
        else:
            return self._model_file()["module"][name].detach().clone()
        whole = torch.empty(shape.numel(), dtype=self.dtype(name))
        length = self._slice(shape)
        for begin, piece in zip(range(0, len(whole), length or 1), slices, strict=False):
            end = min(begin + length, len(whole))  # the rest is padding
            if len(piece) < end - begin:
                raise UserError(f"{self._folder}: damaged, the slices of {name} do not fill its shape {tuple(shape)}")
            whole[begin:end] = piece.detach()[: end - begin]
        return self._files.count(whole).view(shape)
