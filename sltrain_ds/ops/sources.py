"""The C++ and CUDA sources that the ops are built from. Imports neither torch nor a builder."""

from pathlib import Path


def directory() -> Path:
    """csrc beside the package in a checkout, sltrain_ds/csrc in an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    inside, beside = package / "csrc", package.parent / "csrc"
    return inside if (inside / "bindings.cpp").is_file() else beside


def cpp() -> list[str]:
    """Absolute paths: DeepSpeed takes relative ones as its own."""
    return sorted(str(path) for path in directory().glob("*.cpp"))


def headers_and_cpp() -> list[Path]:
    """Whatever a change of which makes another C++ library."""
    return sorted(path for kind in ("*.cpp", "*.h", "cuda/*.h") for path in directory().glob(kind))


def headers_and_cuda() -> list[Path]:
    """Whatever a change of which makes another CUDA library: the kernels include nothing from outside their folder."""
    return sorted(path for kind in ("*.cu", "*.h") for path in (directory() / "cuda").glob(kind))


def cuda() -> list[Path]:
    """The kernels' files, without headers."""
    return sorted((directory() / "cuda").glob("*.cu"))
