"""C++ and CUDA sources of the ops. Imports neither torch nor a builder."""

from pathlib import Path


def directory() -> Path:
    """csrc next to the package in a checkout, sltrain_ds/csrc in an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    inside, beside = package / "csrc", package.parent / "csrc"
    return inside if (inside / "bindings.cpp").is_file() else beside


def cpp() -> list[str]:
    """C++ files as absolute paths, since DeepSpeed resolves relative ones against its own directory."""
    return sorted(str(path) for path in directory().glob("*.cpp"))


def headers_and_cpp() -> list[Path]:
    """All files that the C++ library depends on."""
    return sorted(path for kind in ("*.cpp", "*.h", "cuda/*.h") for path in directory().glob(kind))


def headers_and_cuda() -> list[Path]:
    """All files that the CUDA library depends on: the kernels include nothing from outside their folder."""
    return sorted(path for kind in ("*.cu", "*.h") for path in (directory() / "cuda").glob(kind))


def cuda() -> list[Path]:
    """CUDA kernel files, without headers."""
    return sorted((directory() / "cuda").glob("*.cu"))
