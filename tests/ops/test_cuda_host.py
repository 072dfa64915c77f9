"""The CUDA kernels without a GPU: compiled by nvcc where it is, and run on the host, thread by thread (cuda_host/)."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sltrain_ds.ops import adam4bit, adam8bit, cuda, cuda_build, sources, sparse, support

HOST = Path(__file__).parent / "cuda_host"
FLOATS = [torch.float32, torch.bfloat16]


def compile_for_host(target: Path, *flags: str) -> None:
    """The .cu files with the host's C++20 compiler; skips where it cannot do that."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    files = sources.cuda()
    common = ["-std=c++20", "-O1", "-g", "-pthread", "-ffp-contract=off", "-DSLTRAIN_HOST_SHIM"]
    include = [f"-I{HOST}", f"-I{files[0].parent}"]
    command = [compiler, *common, *include, *flags, "-x", "c++", *map(str, files), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in done.stderr and "tsan" in done.stderr:
        pytest.skip("needs ThreadSanitizer's library (libtsan)")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("host") / "libhost.so"
    compile_for_host(library, "-shared", "-fPIC", '-DSLTRAIN_SOURCES="host"')
    return cuda.Kernels(library)


@pytest.mark.parametrize("column_dtype", [torch.uint16, torch.int32])
@pytest.mark.parametrize("shape, density", [((1, 1), 1.0), ((21, 70), 0.3), ((3, 700), 0.9), ((40, 33), 0.0)])
def test_scatter_and_gather_equal_the_cpu_kernels(kernels, shape, density, column_dtype):
    rows, columns = support.sample(*shape, support.nnz_of(density, *shape), 7, "layer")
    columns = columns.to(column_dtype)
    for weight_dtype in FLOATS:
        for value_dtype in FLOATS:
            W = torch.randn(shape).to(weight_dtype)
            values = torch.randn(columns.numel()).to(value_dtype)
            expected, found = W.clone(), W.clone()
            sparse.scatter_add_(expected, rows, columns, values)
            kernels.scatter_add_(found, rows, columns, values)
            assert torch.equal(found, expected)
            read, read_expected = torch.empty_like(values), torch.empty_like(values)
            sparse.gather(expected, rows, columns, read_expected)
            kernels.gather(read, found, rows, columns)
            assert torch.equal(read, read_expected)


@pytest.mark.parametrize("p_dtype", FLOATS)
@pytest.mark.parametrize("g_dtype", FLOATS)
@pytest.mark.parametrize("numel, shift", [(1, 0), (256, 0), (12 * 256 + 13, 0), (40 * 256 + 8, 1)])
def test_adam_equals_the_cpu_kernel(kernels, p_dtype, g_dtype, numel, shift):
    """Also for tensors that begin off the 16-byte grid, and more blocks than the grid takes at once."""

    def shifted(tensor):
        return torch.cat([tensor[:shift], tensor])[shift:]

    generator = torch.Generator().manual_seed(numel)
    p = torch.randn(numel, generator=generator).to(p_dtype)
    ours = [shifted(tensor) for tensor in (p, *adam8bit.new_states(p))]
    theirs = [tensor.clone() for tensor in ours]
    for step in (1, 2, 3):
        g = shifted(torch.randn(numel, generator=generator).to(g_dtype))
        options = {"weight_decay": 0.1, "decoupled": step != 2, "stochastic": step != 3, "seed": -5, "key": 2**62 + 3}
        options |= {"offset": 256 * (2**32 - 1), "grad_scale": 0.3, "lr": 0.01}
        adam8bit.adam8bit_step_(theirs[0], g, *theirs[1:], step=step, **options)
        kernels.adam8bit_step_(
            *(ours[0], g, *ours[1:], adam8bit.tables(p.device), options["lr"], 0.9, 0.999, 1e-8, 0.1),
            *(options["decoupled"], step, options["stochastic"], -5, 2**62 + 3, options["offset"], 0.3),
        )
        for found, expected in zip(ours, theirs, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("states", ["8bit", "4bit", "32bit"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_many_tensors_in_a_call_equal_one_after_another(kernels, states, dtype):
    """More than a launch takes; ragged, empty and off the grid; the scale is read from memory."""
    generator = torch.Generator().manual_seed(5)
    kind = {"8bit": adam8bit, "4bit": adam4bit}.get(states)
    tables = kind.tables(torch.device("cpu")) if kind else None
    expected, steps = [], []
    for i in range(70):
        numel = [256, 1, 0, 1000, 129, 4096][i % 6]
        p = torch.randn(numel + 1, generator=generator).to(dtype)[i % 2 :][:numel]
        g = torch.randn(numel, generator=generator).to(dtype)
        moments = [*kind.new_states(p)] if kind else [torch.zeros(numel), torch.zeros(numel), None, None]
        run = i // 40 if i < 60 else i  # of equal scalars: longer than a launch takes, shorter, and one by one
        scalars = (0.01 + run / 1e4, 0.9, 0.999, 1e-8, 0.1, run % 3 > 0, 1 + run % 4, run % 5 != 2)
        scalars += (i, 2**40 + i, 256 * i, 0.3)
        copies = [t if t is None else t.clone() for t in (p, *moments)]
        # the scale of the call is multiplied into the tensor's own in fp32
        own = float(torch.tensor(0.3) * torch.tensor(0.7))
        if kind:
            reference = adam8bit.adam8bit_reference if states == "8bit" else adam4bit.adam4bit_reference
            reference(copies[0], g, *copies[1:], tables, *scalars[:-1], own)
        else:
            wide, m, v = adam8bit.stepped(copies[0], g, *copies[1:3], *scalars[:5], scalars[5], scalars[6], own)
            adam8bit.store(copies[0], wide, scalars[7], *[scalars[k] for k in (8, 6, 9, 10)])
            copies[1:3] = m, v
        expected.append(copies)
        steps.append((p, g, *moments, scalars))
    kernels.adam_steps_(states, steps, tables, torch.tensor(0.7))
    for found, copies in zip(steps, expected, strict=True):
        for tensor, other in zip((found[0], *found[2:6]), copies, strict=True):
            assert tensor is None or torch.equal(tensor, other)


@pytest.mark.parametrize("p_dtype", FLOATS)
@pytest.mark.parametrize("g_dtype", FLOATS)
@pytest.mark.parametrize("numel, shift", [(1, 0), (129, 0), (12 * 256 + 13, 0), (40 * 256 + 8, 1)])
def test_4_bit_adam_equals_the_cpu_kernel(kernels, p_dtype, g_dtype, numel, shift):
    def shifted(tensor):
        return torch.cat([tensor[:shift], tensor])[shift:]

    generator = torch.Generator().manual_seed(numel)
    p = torch.randn(numel, generator=generator).to(p_dtype)
    ours = [shifted(tensor) for tensor in (p, *adam4bit.new_states(p))]
    theirs = [tensor.clone() for tensor in ours]
    for step in (1, 2, 3):
        g = shifted(torch.randn(numel, generator=generator).to(g_dtype))
        scalars = (0.01, 0.9, 0.999, 1e-8, 0.1, step != 2, step, step != 3, -5, 2**62 + 3, 256 * (2**32 - 1), 0.3)
        options = dict(
            zip(("decoupled", "step", "stochastic", "seed", "key", "offset", "grad_scale"), scalars[5:], strict=True)
        )
        adam4bit.adam4bit_step_(theirs[0], g, *theirs[1:], lr=0.01, weight_decay=0.1, **options)
        kernels.adam4bit_step_(ours[0], g, *ours[1:], adam4bit.tables(p.device), *scalars)
        for found, expected in zip(ours, theirs, strict=True):
            assert torch.equal(found, expected)


def test_nothing_to_do_is_done(kernels):
    empty = torch.empty(0)
    rows, columns = torch.zeros(1, dtype=torch.int32), torch.empty(0, dtype=torch.uint16)
    kernels.scatter_add_(torch.empty(0, 4), rows, columns, empty)
    kernels.gather(empty, torch.empty(0, 4), rows, columns)
    states = adam8bit.new_states(empty)
    kernels.adam8bit_step_(
        *(empty, empty, *states, adam8bit.tables(empty.device), 0.1, 0.9, 0.999, 1e-8, 0.0),
        *(True, 1, False, 0, 0, 0, 1.0),
    )


def test_what_the_kernels_do_not_take_is_an_error(kernels):
    rows, columns = support.sample(4, 6, 5, 0, "x")
    with pytest.raises(RuntimeError, match=r"float32 and bfloat16, got torch\.float64"):
        kernels.scatter_add_(torch.zeros(4, 6).double(), rows, columns, torch.zeros(5))
    with pytest.raises(RuntimeError, match="differ in length"):
        kernels.gather(torch.zeros(4), torch.zeros(4, 6), rows, columns)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        kernels.gather(torch.zeros(5), torch.zeros(6, 4).t(), rows, columns)
    assert kernels._library.sltrain_cuda_error(-1) == b"a dtype the kernels do not have"
    assert kernels.probe(0) is None and kernels.sources() == "host"


def test_thread_sanitizer_is_silent_and_finds_a_removed_barrier(tmp_path):
    main = ["-fsanitize=thread", "-x", "c++", str(HOST / "main.cpp")]
    with ThreadPoolExecutor() as pool:
        builds = [
            pool.submit(compile_for_host, tmp_path / "whole", *main),
            pool.submit(compile_for_host, tmp_path / "broken", *main, "-DSLTRAIN_DROP_SYNCTHREADS"),
        ]
        for build in builds:
            build.result()
    runs = {
        name: subprocess.run([tmp_path / name], capture_output=True, text=True, timeout=120)
        for name in ("whole", "broken")
    }
    if "unexpected memory mapping" in runs["whole"].stderr:
        pytest.skip("needs a kernel whose address layout ThreadSanitizer accepts (vm.mmap_rnd_bits at most 28)")
    assert runs["whole"].returncode == 0 and runs["whole"].stdout == "right\n", runs["whole"].stderr[:2000]
    assert "WARNING: ThreadSanitizer" not in runs["whole"].stderr
    assert "data race" in runs["broken"].stderr and "adam_kernel" in runs["broken"].stderr


def test_nvcc_builds_the_library_and_it_loads_without_a_gpu(tmp_path):
    if cuda_build.nvcc() is None:
        pytest.skip("needs nvcc")
    library = cuda_build.build(tmp_path / "deep" / cuda_build.LIBRARY)
    assert [path.name for path in library.parent.iterdir()] == [cuda_build.LIBRARY]  # nothing half-written beside it
    built = cuda.Kernels(library)
    assert built.sources() == cuda_build.digest()
    code = library.read_bytes()
    assert b"sm_80" in code and b"sm_90a" in code
    if not torch.cuda.is_available():
        assert built.probe(0)  # says why it cannot run


def test_the_digest_covers_every_file_of_the_kernels_folder(tmp_path, monkeypatch):
    folder = tmp_path / "csrc" / "cuda"
    shutil.copytree(sources.directory() / "cuda", folder)
    assert all("/" not in name for path in folder.iterdir() for name in re.findall('#include "(.*)"', path.read_text()))
    monkeypatch.setattr(sources, "directory", lambda: folder.parent)
    seen = {cuda_build.digest()}
    (folder / "shared.h").touch()
    for path in sorted(folder.iterdir()):
        path.write_text(path.read_text() + "// changed\n")
        seen.add(cuda_build.digest())
    assert len(seen) == 1 + len(list(folder.iterdir()))
    (folder.parent / "cpu.h").write_text("// the CPU's alone\n")
    assert cuda_build.digest() in seen


def test_a_failed_build_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho 'fatal: no such device' >&2\nexit 1\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    target = tmp_path / "out" / cuda_build.LIBRARY
    with pytest.raises(RuntimeError, match="nvcc failed: fatal: no such device"):
        cuda_build.build(target)
    assert not list(target.parent.iterdir())


def test_without_a_cuda_device_pytorch_serves_and_says_so_once(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setattr(cuda, "_state", None)
    assert cuda.status() == (False, "torch sees no CUDA device")
    assert not cuda.load() and not cuda.load()
    out = capsys.readouterr().out
    assert out == "sltrain-ds: PyTorch serves in place of the CUDA kernels: torch sees no CUDA device\n"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As on a machine with a GPU and nvcc, where nothing has been built; the name of the library in the cache."""
    monkeypatch.setattr(cuda, "_state", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "_register", lambda kernels: None)
    cached = tmp_path / "cache" / "lib.so"
    cached.parent.mkdir()
    monkeypatch.setattr(cuda, "_cached", lambda: cached)
    monkeypatch.setattr(cuda_build, "prebuilt", lambda: tmp_path / "prebuilt.so")
    monkeypatch.setattr(cuda_build, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_build, "digest", lambda: "host")  # what the fixture `kernels` was built from
    return cached


def library_of(source: str, target: Path) -> None:
    """A library that knows none of our functions but what `source` says."""
    target.with_suffix(".c").write_text(source)
    compiler = shutil.which("cc") or shutil.which("gcc") or pytest.skip("needs a C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", str(target.with_suffix(".c")), "-o", str(target)], check=True)


FOREIGN = {
    "older": ('const char* sltrain_cuda_sources() { return "older"; }', "it was built from other sources"),
    "someone else's": ("int other() { return 0; }", "it does not say what it was built from"),
    "cut off": (None, "it is not a complete ELF file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("place", ["prebuilt", "cached"])
def test_a_foreign_library_is_named_once_and_built_anew(kernels, gpu, monkeypatch, capsys, kind, place):
    source, problem = FOREIGN[kind]
    path = gpu if place == "cached" else cuda_build.prebuilt()
    if source is None:
        path.write_bytes(Path(kernels._library._name).read_bytes()[:5000])
    else:
        library_of(source, path)

    def build(target):  # puts the file in its place in one step, as the true one does
        shutil.copy(kernels._library._name, target.with_name("new"))
        os.replace(target.with_name("new"), target)

    monkeypatch.setattr(cuda_build, "build", build)
    assert cuda.status() == (True, str(gpu))  # what will serve
    assert cuda.load() and cuda.load() and cuda.status() == (True, str(gpu))
    out = capsys.readouterr().out
    assert out.count("is not used") == 1 and f"{path} is not used: {problem}" in out
    assert cuda._state[0].sources() == "host"


def test_without_nvcc_a_foreign_library_leaves_the_work_to_pytorch(gpu, monkeypatch, capsys):
    library_of(FOREIGN["older"][0], cuda_build.prebuilt())
    monkeypatch.setattr(cuda_build, "nvcc", lambda: None)
    why = f"{cuda_build.prebuilt()} is not used: it was built from other sources, and nvcc was not found"
    assert cuda.status() == (False, why) and not cuda.load() and not cuda.load()
    assert capsys.readouterr().out == f"sltrain-ds: PyTorch serves in place of the CUDA kernels: {why}\n"


def test_a_library_of_these_sources_serves_and_a_failed_build_does_not(kernels, gpu, monkeypatch):
    def fails(target):
        raise RuntimeError("nvcc failed: no space\nmore")

    monkeypatch.setattr(cuda_build, "build", fails)
    assert not cuda.load() and cuda.status() == (False, "nvcc failed: no space")
    monkeypatch.setattr(cuda, "_state", None)
    shutil.copy(kernels._library._name, cuda_build.prebuilt())
    assert cuda.load() and cuda.status() == (True, str(cuda_build.prebuilt()))


def test_the_dispatcher_takes_the_kernels(kernels, monkeypatch):
    """`torch.ops.sltrain` reaches them for CUDA tensors: seen in the dispatcher's table, since there is no GPU."""
    if not cuda.builder.load():
        pytest.skip(cuda.builder.status()[1])
    monkeypatch.setattr(cuda, "_registrations", [])
    cuda._register(kernels)
    for name in ("scatter_add_", "gather", "adam8bit_step_", "adam4bit_step_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sltrain::{name}", "CUDA")
