"""Build of the CUDA kernels as one library, libsltrain_cuda.so, independent of the torch and Python versions.

``launch/build_cuda.sh`` builds it into the package, and wheels include it; a node with nvcc builds its own at first
use. This module needs neither torch nor a GPU.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from sltrain_ds.ops import sources

LIBRARY = "libsltrain_cuda.so"
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    # IEEE arithmetic, each operation rounded separately: bit-identical to the CPU kernels
    "-fmad=false",
    "-ftz=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    # A100 and H100/H200, and PTX for any later device
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=compute_80",
    "-Xcompiler=-fPIC",
    "-cudart=static",
]


def prebuilt() -> Path:
    """Path of a library built ahead of time, next to this file."""
    return Path(__file__).resolve().parent / LIBRARY


def digest() -> str:
    """Hash of the sources and flags; the library contains it (``sltrain_cuda_sources``)."""
    total = hashlib.sha256(" ".join(NVCC_FLAGS).encode())
    for path in sources.headers_and_cuda():
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def nvcc() -> str | None:
    """Path of nvcc: under CUDA_HOME (or CUDA_PATH), else the first on PATH, else in /usr/local/cuda/bin."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    return (
        next((str(p) for p in places if p.is_file()), None)
        or shutil.which("nvcc")
        or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def build(target: Path) -> Path:
    """Compile the library to ``target``, about 20 s. Raises RuntimeError with the compiler's message on failure."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was not found (on PATH or under CUDA_HOME)")
    if not sources.cuda():
        raise RuntimeError("the CUDA sources are missing")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    flags = [*NVCC_FLAGS, f'-DSLTRAIN_SOURCES="{digest()}"', "--threads=0", "-shared", "-o", str(unfinished)]
    try:
        done = subprocess.run([compiler, *flags, *map(str, sources.cuda())], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed: {(done.stderr or done.stdout).strip()}")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


if __name__ == "__main__":
    print(build(prebuilt()))
