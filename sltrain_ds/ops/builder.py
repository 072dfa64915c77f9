"""Builder and loader of the C++ ops: built ahead of time, or at first use through DeepSpeed's op builder.

``load()`` tries in this order: the extension ``sltrain_ds.ops._C`` built by setup.py; a library that an earlier process
built in torch's extension cache; a build (about 20 s), done once for all ranks that request it at the same time.
Without a compiler it falls back to the PyTorch reference, slower and with the same results up to rounding, and prints
the reason once. SLTRAIN_OPS=reference forces the fallback.

Top-level imports are light, because setup.py reads the flags from here.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from sltrain_ds.errors import UserError
from sltrain_ds.ops import cpu_level, sources

CXX_FLAGS = [
    "-O3",
    "-fopenmp",
    "-fno-math-errno",  # lets square roots vectorise
]  # torch adds the C++ standard it needs; no -march, so that the nodes of a cluster can share the cache
LINK_FLAGS = ["-fopenmp"]

_state = None  # ("prebuilt" | "jit" | "reference", detail) after load()


def load() -> bool:
    """Make torch.ops.sltrain's C++ kernels available. Returns False if the PyTorch reference is used instead."""
    return (_state or _load())[0] != "reference"


def loaded() -> bool:
    """Whether ``load`` has loaded the ops; loads nothing itself."""
    return _state is not None and _state[0] != "reference"


def build_ahead(verbose: bool = False) -> tuple[str, str]:
    """Build now, before any rank starts; returns the resulting ``status``."""
    return _load(verbose)


def cpu_level_in_force() -> str | None:
    """CPU level of the C++ ops; None if the PyTorch reference is used or nothing is built yet."""
    if status()[0] == "reference" or not built() or not load():
        return None
    return cpu_level.in_force()


def clear_dead_locks() -> None:
    """Remove locks that killed builds of DeepSpeed's ops left, on which the next start would wait indefinitely.

    All ranks may call it at once; call it before ``deepspeed.init_distributed``.
    """
    from torch.utils import cpp_extension

    from sltrain_ds.ops import build_lock

    for directory in Path(cpp_extension._get_build_directory("", False)).glob("*/"):
        if (directory / "lock").exists():
            with build_lock.exclusive(directory):
                build_lock.remove_dead(directory)


def build_deepspeed_ops(verbose: bool = False) -> str | None:
    """Build the op that DeepSpeed's first engine on the CPU would build (about a minute); returns its name.

    Returns None if nothing is built: on a GPU, or without a compiler.
    """
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu" or missing_tools():
        return None
    op = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if not op.is_compatible():
        return None
    from torch.utils import cpp_extension

    from sltrain_ds.ops import build_lock

    directory = Path(cpp_extension._get_build_directory(op.name, False))
    # one of our processes at a time: otherwise each might consider the other's lock stale
    with build_lock.exclusive(directory), tools_on_path():
        build_lock.remove_dead(directory)
        op.load(verbose)
    return op.name


def status() -> tuple[str, str]:
    """("prebuilt" | "jit" | "reference", the library's path or the reason), without building anything.

    Before a build, the detail of "jit" is the build directory.
    """
    if _state is not None:
        return _state
    if forced():
        return "reference", "SLTRAIN_OPS=reference"
    if importlib.util.find_spec("sltrain_ds.ops._C") is not None:
        return "prebuilt", importlib.util.find_spec("sltrain_ds.ops._C").origin
    missing = missing_tools()
    library = cached_library()
    if library is None and missing:
        return "reference", missing
    return "jit", str(library or build_directory())


def extension_name() -> str:
    """Name with a hash of the sources, flags and torch version, so that a cached library always matches."""
    import torch

    digest = hashlib.sha256(f"{torch.__version__} {sys.version_info[:2]} {CXX_FLAGS} {LINK_FLAGS}".encode())
    for path in sources.headers_and_cpp():
        digest.update(path.read_bytes())
    return f"sltrain_ops_{digest.hexdigest()[:12]}"


def build_directory() -> Path:
    """This extension's directory in torch's cache (TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions)."""
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(extension_name(), False))


def cached_library() -> Path | None:
    """Library of a completed earlier build, or None."""
    directory = build_directory()
    library = directory / f"{directory.name}.so"
    return library if (directory / "complete").exists() and library.exists() else None


def missing_tools() -> str | None:
    """Message about what is missing for a build, or None."""
    if not sources.cpp():
        return f"the C++ sources are missing ({sources.directory()})"
    compiler = os.environ.get("CXX", "c++")
    with tools_on_path():
        if not shutil.which(compiler.split()[0]):
            return f"no C++ compiler ({compiler}) was found"
        if not shutil.which("ninja"):
            return "ninja was not found"
    return None


def built() -> bool:
    """Whether ``load`` would find a library without building one."""
    if _state is not None:
        return _state[0] != "reference"
    return importlib.util.find_spec("sltrain_ds.ops._C") is not None or cached_library() is not None


def _load(verbose=False):
    global _state
    cpu_level.check_name()
    found = _find(verbose)
    if found[0] != "reference":
        cpu_level.check_processor()
    _state = found
    if _state[0] == "reference" and os.environ.get("RANK", "0") == "0":
        print(f"sltrain-ds: the PyTorch reference serves in place of the C++ ops: {_state[1]}", flush=True)
    return _state


def _find(verbose):
    if forced():
        return "reference", "SLTRAIN_OPS=reference"
    import torch  # its libraries must be loaded before one that is linked against them

    try:
        return "prebuilt", importlib.import_module("sltrain_ds.ops._C").__file__
    except ModuleNotFoundError:
        pass
    except ImportError as error:  # built against another torch
        print(
            f"sltrain-ds: the ops built ahead of time do not load ({_first_line(error)}); rebuilding them",
            flush=True,
        )
    library = cached_library()
    if library is None:
        missing = missing_tools()
        if missing:
            return "reference", missing
        try:
            library = _build(verbose)
        except Exception as error:  # any failure of the compiler
            return "reference", f"the build failed ({_first_line(error)}); `sltrain-ds doctor --build` shows the log"
    torch.ops.load_library(str(library))
    return "jit", str(library)


def _build(verbose: bool) -> Path:
    """Build in one process; the others wait and use the result."""
    from sltrain_ds.ops import build_lock

    directory = build_directory()
    with build_lock.exclusive(directory) as owned:
        library = cached_library()
        if library is not None:
            return library
        build_lock.remove_dead(directory, owned)
        print("sltrain-ds: building the C++ ops (once, about 20 s)", flush=True)
        with tools_on_path():
            _op_builder().jit_load(verbose=verbose)
        (directory / "complete").touch()
    return directory / f"{directory.name}.so"


def _op_builder():
    from deepspeed.ops.op_builder.builder import OpBuilder

    class SLTrainOpsBuilder(OpBuilder):
        """Our ops as a DeepSpeed op builder (deepspeed/ops/op_builder/builder.py, 0.19.8)."""

        BUILD_VAR = "SLTRAIN_BUILD_OPS"
        NAME = extension_name()

        def __init__(self):
            super().__init__(name=self.NAME)

        def absolute_name(self):
            return "sltrain_ds.ops._C"

        def sources(self):
            return sources.cpp()

        def cxx_args(self):
            return list(CXX_FLAGS)

        def extra_ldflags(self):
            return list(LINK_FLAGS)

    return SLTrainOpsBuilder()


def forced() -> bool:
    choice = os.environ.get("SLTRAIN_OPS", "")
    if choice not in ("", "reference"):
        raise UserError(f"SLTRAIN_OPS = {choice!r} is not known; set it to 'reference' or leave it unset")
    return choice == "reference"


@contextlib.contextmanager
def tools_on_path():
    """Put python's directory first on PATH, with the ninja that pip installed there.

    It is not on PATH if a venv's python was called by its path. Alternating with the system's version of ninja would
    recompile everything each time, since the two do not read each other's logs.
    """
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _first_line(error) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
