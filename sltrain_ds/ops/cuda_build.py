"""The CUDA kernels as one library, libsltrain_cuda.so: free of torch, so one build serves every torch and Python.

``launch/build_cuda.sh`` makes it once, into the package, from where a wheel takes it along; a node that has nvcc
makes its own at first use. This file needs neither torch nor a GPU.
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
    # IEEE arithmetic, each operation rounded by itself: the CPU kernels' bits
    "-fmad=false",
    "-ftz=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    # A100 and H100/H200, and what any later device compiles for itself
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=compute_80",
    "-Xcompiler=-fPIC",
    "-cudart=static",
]


def prebuilt() -> Path:
    """Where a library built once lies, beside this file."""
    return Path(__file__).resolve().parent / LIBRARY


def digest() -> str:
    """Names the sources and flags; the library carries it (``sltrain_cuda_sources``)."""
    total = hashlib.sha256(" ".join(NVCC_FLAGS).encode())
    for path in sources.headers_and_cuda():
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def nvcc() -> str | None:
    """Path of nvcc: under CUDA_HOME where that is set, else the first on PATH, else the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    return (
        next((str(p) for p in places if p.is_file()), None)
        or shutil.which("nvcc")
        or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def build(target: Path) -> Path:
    """Compile the library to ``target``, about 20 s. Raises RuntimeError with the compiler's words where it cannot."""
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
