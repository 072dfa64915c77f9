"""Cache of the modes' measured times in the user's cache directory, so that a machine measures a layer once.

modes.json under $XDG_CACHE_HOME/sltrain_ds (~/.cache/sltrain_ds): {"format": 1, "times": {machine: {layer: {name:
seconds}}}}. A machine is a device with its instruction set, threads, and the versions of torch, of this package and of
its kernels; a change of any of them causes a new measurement.
"""

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path

import torch

from sltrain_ds import __version__
from sltrain_ds.ops import builder, cuda, cuda_build
from sltrain_ds.ops.device_name import device_name, instructions
from sltrain_ds.ops.measure_modes import Layer

FORMAT = 1


def path() -> Path:
    """Path of the cache file, which may not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sltrain_ds" / "modes.json"


def find(layer: Layer, names: list[str]) -> dict[str, float] | None:
    """{name: seconds} if all of `names` have been measured on this machine, else None."""
    found = _read().get(_machine(layer.device), {}).get(_key(layer), {})
    return {name: found[name] for name in names} if set(names) <= set(found) else None


def keep(layer: Layer, times: dict[str, float]) -> None:
    """Add the times to the file, written atomically; prints the reason if it cannot be written."""
    everything, machine = _read(), _machine(layer.device)
    everything.setdefault(machine, {})[_key(layer)] = times
    target, partial = path(), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # a unique name: other runs may write at the same time; the last one wins
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=".modes.", delete=False) as file:
            partial = file.name
            json.dump({"format": FORMAT, "times": everything}, file, indent=1)
        os.replace(partial, target)
    except OSError as error:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
        _say(f"{target}: cannot be written ({error.strerror}); the modes are measured again at the next start")


def _read() -> dict[str, dict[str, dict[str, float]]]:
    target = path()
    try:
        found = json.loads(target.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _say(f"{target}: cannot be read ({error}); the modes are measured again")
        return {}
    if not _is_sound(found):
        _say(f"{target}: is not a file of measured modes; they are measured again")
        return {}
    return found["times"]


def _is_sound(found) -> bool:
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("times"), dict):
        return False
    layers = [layers for layers in found["times"].values() if isinstance(layers, dict)]
    times = [times for of_machine in layers for times in of_machine.values() if isinstance(times, dict)]
    seconds = [one for found in times for one in found.values()]
    return (
        len(layers) == len(found["times"])
        and len(times) == sum(map(len, layers))
        and all(type(one) in (int, float) and 0 <= one < math.inf for one in seconds)
    )


def _machine(device) -> str:
    kind = torch.device(device).type
    parts = [device_name(device), instructions(device), f"torch {torch.__version__}", f"sltrain_ds {__version__}"]
    parts += [f"kernels {_kernels(kind)}", f"operator {_operator()}"]
    return "; ".join([*parts, *([f"{torch.get_num_threads()} threads"] if kind == "cpu" else [])])


def _kernels(kind) -> str:
    if kind == "cuda":
        return cuda_build.digest() if cuda.load() else "PyTorch's"
    return builder.extension_name() if builder.load() else "PyTorch's"


def _operator() -> str:
    """Digest of the files in this directory, which call and measure the kernels."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _key(layer: Layer) -> str:
    parts = [f"{layer.out_features}x{layer.in_features}", f"rank {layer.rank}", f"{layer.nnz} non-zeros"]
    parts += [f"{layer.tokens} tokens", str(layer.dtype).removeprefix("torch.")]
    return ", ".join([*parts, *["bias"] * layer.bias, *["recomputed"] * layer.recomputed])


_said = set()


def _say(line):
    """Print a line once."""
    if line not in _said:
        _said.add(line)
        print(f"sltrain_ds: {line}", flush=True)
