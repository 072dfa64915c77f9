"""`sltrain-ds doctor`: reports versions, ops, apex, bitsandbytes and the accelerator; `--build` compiles the ops."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path

from sltrain_ds import __version__

SUPPORTED = {  # package -> [at least, below), as in setup.py
    "torch": ("2.11", "2.16"),
    "deepspeed": ("0.19.8", "0.20"),
    "transformers": ("5.17", "6"),
    "datasets": ("5.2", "6"),
    "bitsandbytes": ("0.50.2", "0.51"),
    "sentencepiece": ("0.2.1", None),
}
PYTHON = ("3.11", "3.14")
APEX_EXTENSIONS = ("amp_C", "fused_layer_norm_cuda", "xentropy_cuda")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("doctor", help="report what is installed, built and missing")
    parser.add_argument("--build", action="store_true", help="build the C++ ops now, before any rank starts")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 if `--build` was given and building the ops failed although there is a compiler, else 0."""
    if args.json:  # builds print; reserve stdout for the object
        stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        built = build() if args.build else None
        found = examine()
    finally:
        if args.json:
            sys.stdout = stdout
    if built is not None:
        found["built"] = built
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 1 if built is not None and built["failed"] else 0


def build() -> dict:
    """Build our ops and the op that DeepSpeed's first engine on the CPU would build, so that no rank compiles."""
    import torch

    from sltrain_ds.ops import builder, cuda

    kind, detail = builder.build_ahead(verbose=True)
    if torch.cuda.is_available():
        cuda.load()
    failed = kind == "reference" and builder.missing_tools() is None and not builder.forced()
    return {"ops": f"{kind}: {detail}", "deepspeed": builder.build_deepspeed_ops(), "failed": failed}


def examine() -> dict:
    """Everything that `doctor` reports, as plain values."""
    versions = {name: _version(name) for name in SUPPORTED}
    return {
        "sltrain_ds": __version__,
        "python": platform.python_version(),
        "versions": versions,
        "ops": ops(),
        "cpu_level": cpu_level(),
        "cuda_ops": cuda_ops(),
        "apex": apex(),
        "bitsandbytes": bitsandbytes(),
        "accelerator": accelerator(),
        "warnings": warnings(versions),
    }


def ops() -> dict:
    """State of the C++ ops in ds_report's terms: {"installed", "compatible", "kind", "detail"}."""
    from sltrain_ds.ops import builder

    kind, detail = builder.status()
    return {"installed": kind == "prebuilt", "compatible": kind != "reference", "kind": kind, "detail": detail}


def cpu_level() -> str:
    """Instruction set that the C++ ops use, and whether it was forced."""
    from sltrain_ds.ops import builder

    level = builder.cpu_level_in_force()
    if level is None:
        return "none: no C++ ops are loaded"
    return f"{level} (SLTRAIN_CPU)" if os.environ.get("SLTRAIN_CPU") else level


def cuda_ops() -> dict:
    """State of the CUDA kernels: {"serve": whether CUDA tensors use them, "detail": library path or reason}."""
    from sltrain_ds.ops import cuda

    serve, detail = cuda.status()
    return {"serve": serve, "detail": detail}


def apex() -> str:
    """Distinguish NVIDIA's apex from the unrelated package of that name on PyPI, without importing either."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed (optional)"
    homes = [Path(place) for place in spec.submodule_search_locations or []]
    if not any((home / "normalization" / "fused_layer_norm.py").is_file() for home in homes):
        return "another package called apex (PyPI's), not NVIDIA's: uninstall it"
    missing = [name for name in APEX_EXTENSIONS if importlib.util.find_spec(name) is None]
    if missing:
        return f"NVIDIA apex without its CUDA extensions ({', '.join(missing)}): install it as described in its README"
    return "NVIDIA apex with its CUDA extensions"


def bitsandbytes() -> str:
    """Whether bitsandbytes can provide 8-bit states, and on which device."""
    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        return "not installed: 8-bit states are not available"
    if not torch.cuda.is_available():
        return "on the CPU (plain PyTorch inside)"
    wanted = f"libbitsandbytes_cuda{(torch.version.cuda or '').replace('.', '')}.so"
    home = Path(importlib.util.find_spec("bitsandbytes").origin).parent
    return f"CUDA ({wanted})" if (home / wanted).exists() else f"has no {wanted}: 8-bit states will fail on the GPU"


def accelerator() -> str:
    """Device that a run would use."""
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(sorted(names))} (CUDA {torch.version.cuda})"
    if Path("/proc/driver/nvidia/version").exists():
        return f"cpu: the driver shows a GPU that this torch ({torch.__version__}) cannot use"
    return f"cpu, {len(os.sched_getaffinity(0))} cores"


def warnings(versions: dict) -> list[str]:
    """Versions outside the supported ranges, one line each."""
    found = {"python": platform.python_version(), **versions}
    lines = []
    for name, (least, below) in {"python": PYTHON, **SUPPORTED}.items():
        wanted = f"{least} or later" + (f", below {below}" if below else "")
        if found[name] is None:
            lines.append(f"{name} is not installed; supported: {wanted}")
        elif not _within(found[name], least, below):
            lines.append(f"{name} {found[name]} is outside the tested range; supported: {wanted}")
    return lines


def as_text(found: dict) -> str:
    """The report as text, ops in ds_report's columns."""
    rule = "-" * 74
    lines = [rule, f"sltrain_ds {found['sltrain_ds']}, Python {found['python']}", rule]
    lines += [
        f"{name} {'.' * (22 - len(name))} {version or 'not installed'}" for name, version in found["versions"].items()
    ]
    state = found["ops"]
    told = {"prebuilt": "built ahead of time", "jit": "built at first use", "reference": "the PyTorch reference serves"}
    lines += [rule, "op name ............... installed .. compatible", rule]
    installed, compatible = ("[YES]" if state["installed"] else "[NO]"), ("[OKAY]" if state["compatible"] else "[NO]")
    lines += [f"sltrain_ops ........... {installed:.<12} {compatible}", f"  {told[state['kind']]}: {state['detail']}"]
    lines.append(f"  CPU level: {found['cpu_level']}")
    kernels = found["cuda_ops"]
    serve = "[YES]" if kernels["serve"] else "[NO]"
    lines += [f"CUDA kernels .......... {serve}", f"  {kernels['detail']}"]
    if "built" in found:
        lines.append(f"  DeepSpeed's op: {found['built']['deepspeed'] or 'none needed'}")
    lines.append(rule)
    lines += [f"{name} {'.' * (22 - len(name))} {found[name]}" for name in ("apex", "bitsandbytes", "accelerator")]
    lines += [f"warning: {line}" for line in found["warnings"]]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _within(version: str, least: str, below: str | None) -> bool:
    from packaging.version import Version

    base = Version(Version(version).base_version)  # 2.13.0+cpu is 2.13.0
    return Version(least) <= base and (below is None or base < Version(below))
