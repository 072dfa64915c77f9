"""CUDA kernels, called through ctypes: scatter-add, gather, blockwise Adam steps.

``load()`` finds the library (``cuda_build``): built ahead of time next to this file, in torch's extension cache from an
earlier process, or built now if nvcc is available. Without a library that runs here it falls back to PyTorch and prints
the reason once. Kernels are launched on the current stream without synchronization. They are also registered with the
schema of csrc/bindings*.cpp, so ``torch.ops.sltrain`` dispatches CUDA tensors to them.
"""

import _ctypes
import ctypes
import os
import struct
from pathlib import Path

import torch

from sltrain_ds.ops import build_lock, builder, cuda_build, sources
from sltrain_ds.ops.cuda_checks import CHECKS, DTYPES, check_support, require, step_and_offset

_ADAM_TENSOR = struct.Struct("=6Q5q6d2i")  # sltrain_adam_tensor of csrc/cuda/launchers.h

_state = None  # (Kernels | None, the library's path or the reason)
_registrations = []


def load() -> bool:
    """Load the CUDA kernels. Returns False if PyTorch is used in their place."""
    return _decide()[0] is not None


def status() -> tuple[bool, str]:
    """(whether the kernels are used, the library's path or the reason why not), without building anything."""
    if _state is not None:
        return _state[0] is not None, _state[1]
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    if builder.forced():
        return False, "SLTRAIN_OPS=reference"
    found = {path: misfit(path) for path in (cuda_build.prebuilt(), _cached()) if path.is_file()}
    fitting = [path for path, problem in found.items() if problem is None]
    if fitting or cuda_build.nvcc():
        return True, str(fitting[0] if fitting else _cached())
    refused = "; ".join(f"{path} is not used: {problem}" for path, problem in found.items())
    return False, f"{refused or f'no {cuda_build.LIBRARY} was built ahead of time'}, and nvcc was not found"


def scatter_add_(W, rows, columns, values) -> None:
    """W (out, in) += values (nnz,) at the support, like ``sparse.scatter_add_``; float32 and bfloat16."""
    _decide()[0].scatter_add_(W, rows, columns, values)


def gather(out, W, rows, columns) -> None:
    """out (nnz,) = W (out, in) at the support, like ``sparse.gather``; float32 and bfloat16."""
    _decide()[0].gather(out, W, rows, columns)


def adam_steps_(states: str, steps: list[tuple], tables: torch.Tensor | None, grad_scale=None) -> None:
    """Step many tensors, up to 31 per launch; ``states`` is "8bit", "4bit" or "32bit".

    Each of ``steps`` is (p, g, m, v, absmax_m, absmax_v, scalars). Tensors are those of the format's step (32-bit
    states have float32 moments and None for absmax), all p of one dtype, all g of one dtype, on one device; scalars are
    the operator's arguments from ``lr`` on. ``grad_scale``, float32 () on the device or None, also multiplies every
    gradient.
    """
    _decide()[0].adam_steps_(states, steps, tables, grad_scale)


def adam8bit_step_(*arguments) -> None:
    """Operator ``sltrain::adam8bit_step_``, with its arguments in order."""
    _decide()[0].adam8bit_step_(*arguments)


def adam4bit_step_(*arguments) -> None:
    """Operator ``sltrain::adam4bit_step_``, with its arguments in order."""
    _decide()[0].adam4bit_step_(*arguments)


class Kernels:
    """One loaded library. Arguments are checked like those of the CPU kernels; errors are RuntimeError."""

    def __init__(self, path: Path):
        self._library = library = ctypes.CDLL(str(path))
        pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        library.sltrain_cuda_sources.restype = library.sltrain_cuda_error.restype = ctypes.c_char_p
        support = [i64, i64, i32, pointer]
        library.sltrain_cuda_scatter_add.argtypes = [pointer, i32, pointer, pointer, i32, pointer, i32, *support]
        library.sltrain_cuda_gather.argtypes = [pointer, i32, pointer, i32, pointer, pointer, i32, *support]
        self._adam = {bits: getattr(library, f"sltrain_cuda_adam{bits}") for bits in ("8bit", "4bit", "32bit")}
        for function in self._adam.values():
            function.argtypes = [i32, i32, pointer, i64, pointer, pointer, i32, pointer]

    def sources(self) -> str:
        """Digest of the sources it was built from."""
        return self._library.sltrain_cuda_sources().decode()

    def addresses(self) -> list[int]:
        """Addresses of the functions that csrc/moves.cpp calls: scatter-add, gather, and error message."""
        names = ("scatter_add", "gather", "error")
        functions = (getattr(self._library, f"sltrain_cuda_{name}") for name in names)
        return [ctypes.cast(function, ctypes.c_void_p).value for function in functions]

    def probe(self, device: int) -> str | None:
        """None if the library runs on the device, else the error message."""
        code = self._library.sltrain_cuda_probe(device)
        return self._words(code) if code else None

    def scatter_add_(self, W, rows, columns, values):
        check_support(W, rows, columns, values)
        self._call(
            self._library.sltrain_cuda_scatter_add,
            *(W.data_ptr(), DTYPES[W.dtype], rows.data_ptr(), columns.data_ptr(), columns.element_size()),
            *(values.data_ptr(), DTYPES[values.dtype], *W.shape, *_where(W)),
        )

    def gather(self, out, W, rows, columns):
        check_support(W, rows, columns, out)
        self._call(
            self._library.sltrain_cuda_gather,
            *(out.data_ptr(), DTYPES[out.dtype], W.data_ptr(), DTYPES[W.dtype]),
            *(rows.data_ptr(), columns.data_ptr(), columns.element_size(), *W.shape, *_where(W)),
        )

    def adam8bit_step_(self, p, g, m8, v8, absmax_m, absmax_v, tables, *scalars):
        self.adam_steps_("8bit", [(p, g, m8, v8, absmax_m, absmax_v, scalars)], tables)

    def adam4bit_step_(self, p, g, m4, v4, absmax_m, absmax_v, tables, *scalars):
        self.adam_steps_("4bit", [(p, g, m4, v4, absmax_m, absmax_v, scalars)], tables)

    def adam_steps_(self, states, steps, tables, grad_scale=None):
        if not steps:
            return
        first, packed = steps[0], bytearray(_ADAM_TENSOR.size * len(steps))
        for i, (p, g, m, v, absmax_m, absmax_v, scalars) in enumerate(steps):
            require(p.dtype == first[0].dtype and g.dtype == first[1].dtype, f"adam{states}: dtypes differ in a call")
            CHECKS[states](p, g, m, v, absmax_m, absmax_v, tables, *step_and_offset(scalars))
            lr, beta1, beta2, eps, weight_decay, decoupled, step, stochastic, seed, key, offset, own_scale = scalars
            absmax = (0, 0) if absmax_m is None else (absmax_m.data_ptr(), absmax_v.data_ptr())
            _ADAM_TENSOR.pack_into(
                packed, i * _ADAM_TENSOR.size,
                p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), *absmax,
                p.numel(), step, seed, key, offset,
                lr, beta1, beta2, eps, weight_decay, own_scale, decoupled, stochastic,
            )  # fmt: skip
        self._call(
            self._adam[states],
            *(DTYPES[first[0].dtype], DTYPES[first[1].dtype], ctypes.addressof(ctypes.c_char.from_buffer(packed))),
            *(len(steps), None if tables is None else tables.data_ptr()),
            *(None if grad_scale is None else grad_scale.data_ptr(), *_where(first[0])),
        )

    def _call(self, function, *arguments):
        code = function(*arguments)
        if code:
            raise RuntimeError(f"{function.__name__}: {self._words(code)}")

    def _words(self, code):
        return self._library.sltrain_cuda_error(code).decode()


def _decide():
    global _state
    if _state is None:
        _state = _find()
        if _state[0] is not None:
            _register(_state[0])
        elif os.environ.get("RANK", "0") == "0":
            print(f"sltrain-ds: PyTorch serves in place of the CUDA kernels: {_state[1]}", flush=True)
    return _state


def _find():
    works, detail = status()
    if not works:
        return None, detail
    for path in filter(Path.is_file, (cuda_build.prebuilt(), _cached())):
        problem = misfit(path)
        if problem is None:
            return _probed(Kernels(path), path)
        if os.environ.get("RANK", "0") == "0":
            print(f"sltrain-ds: {path} is not used: {problem}; launch/build_cuda.sh rebuilds it", flush=True)
    try:
        path = _build()
    except Exception as error:  # any failure of the compiler
        return None, str(error).splitlines()[0]
    return _probed(Kernels(path), path)


def misfit(path: Path) -> str | None:
    """Why a library cannot be used, or None. Its digest is read before any other symbol: a library built from older
    sources may lack today's functions or have other arguments."""
    if not _is_whole(path):
        return "it is not a complete ELF file"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"it does not load ({error})"
    problem = _foreign(library)
    if problem:
        _ctypes.dlclose(library._handle)  # otherwise dlopen would return it again for the rebuilt file
    return problem


def _is_whole(path):
    """Whether a 64-bit ELF file has its section headers, which linkers write last: loading a truncated file crashes
    the process.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return False
    (sections,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<2H", head, 58)
    return sections + size * count <= path.stat().st_size


def _foreign(library):
    try:
        found = library.sltrain_cuda_sources
    except AttributeError:
        return "it does not say what it was built from"
    found.restype = ctypes.c_char_p
    wanted = cuda_build.digest() if sources.cuda() else None
    return None if wanted in (None, found().decode()) else "it was built from other sources"


def _probed(kernels, path):
    problem = kernels.probe(torch.cuda.current_device())
    return (None, f"{path}: {problem}") if problem else (kernels, str(path))


def _cached() -> Path:
    from torch.utils import cpp_extension

    name = f"sltrain_cuda_{cuda_build.digest()}"
    return Path(cpp_extension._get_build_directory(name, False)) / cuda_build.LIBRARY


def _build() -> Path:
    """Build in one process; the others wait and use the result."""
    target = _cached()
    with build_lock.exclusive(target.parent):
        if not target.is_file() or misfit(target):
            print("sltrain-ds: building the CUDA kernels (once, about 20 s)", flush=True)
            cuda_build.build(target)
    return target


def _register(kernels):
    """Register the kernels with the C++ ops: with the dispatcher for operators with a schema, and with csrc/moves.cpp
    for those that whole layers call.
    """
    if not builder.load():
        return
    torch.ops.sltrain.use_cuda_kernels(*kernels.addresses())
    library = torch.library.Library("sltrain", "IMPL")
    for name in ("scatter_add_", "gather", "adam8bit_step_", "adam4bit_step_"):
        library.impl(name, getattr(kernels, name), "CUDA")
    _registrations.append(library)  # keeps the registration alive


def _where(tensor):
    """(device index, current stream) of the tensor's device."""
    if tensor.device.type != "cuda":
        return 0, None
    index = tensor.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)  # runs in every call, so it avoids a Stream object
