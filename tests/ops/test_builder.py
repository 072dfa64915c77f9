import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sltrain_ds.errors import UserError
from sltrain_ds.ops import build_lock, builder, sources

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A builder that has not decided yet, and an empty extension cache."""
    monkeypatch.setattr(builder, "_state", None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("SLTRAIN_OPS", raising=False)
    return tmp_path


class FakeOp:
    """Builds as DeepSpeed's would, without a compiler: a library appears, slowly, and torch's lock must be free."""

    def jit_load(self, verbose):
        directory = builder.build_directory()
        with open(directory / "lock", "x"):
            time.sleep(0.3)
            with open(directory / "builds", "a") as log:
                log.write("one\n")
            (directory / f"{directory.name}.so").touch()
        (directory / "lock").unlink()


def test_flags_can_be_imported_without_torch_or_deepspeed():
    code = (
        "import sys; from sltrain_ds.ops.builder import CXX_FLAGS, LINK_FLAGS; print('torch' in sys.modules, CXX_FLAGS)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False") and "-fopenmp" in done.stdout


def test_sources_are_absolute_and_there():
    assert len(sources.cpp()) >= 2
    assert all(os.path.isabs(path) and os.path.exists(path) for path in sources.cpp())


@pytest.mark.parametrize(
    "change, reason",
    [
        (("CXX", "no-such-compiler"), r"no C\+\+ compiler \(no-such-compiler\) was found"),
        (("SLTRAIN_OPS", "reference"), "SLTRAIN_OPS=reference"),
    ],
)
def test_the_reference_serves_and_says_so_once(fresh, monkeypatch, capsys, change, reason):
    monkeypatch.setenv(*change)
    assert builder.status()[0] == "reference"
    assert not builder.load() and not builder.load()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("sltrain-ds: the PyTorch reference serves in place of the C++ ops: ")
    assert re.search(reason, lines[0])


def test_other_ranks_than_the_first_say_nothing(fresh, monkeypatch, capsys):
    monkeypatch.setenv("SLTRAIN_OPS", "reference")
    monkeypatch.setenv("RANK", "3")
    assert not builder.load()
    assert capsys.readouterr().out == ""


def test_unknown_choice_is_refused(fresh, monkeypatch):
    monkeypatch.setenv("SLTRAIN_OPS", "cuda")
    with pytest.raises(UserError, match=r"SLTRAIN_OPS = 'cuda' is not known; set it to 'reference'"):
        builder.load()


def test_a_failed_build_leaves_the_reference_with_the_reason(fresh, monkeypatch, capsys):
    class Broken:
        def jit_load(self, verbose):
            raise RuntimeError("error: no space left\nand more lines")

    if builder.missing_tools():
        pytest.skip(builder.missing_tools())
    monkeypatch.setattr(builder, "_op_builder", Broken)
    assert not builder.load()
    out = capsys.readouterr().out
    assert "the build failed (error: no space left)" in out and "more lines" not in out
    assert builder.cached_library() is None


def test_a_dead_builds_lock_is_removed_with_a_line(fresh, monkeypatch, capsys):
    monkeypatch.setattr(builder, "_op_builder", FakeOp)
    lock = builder.build_directory() / "lock"
    lock.touch()
    library = builder._build(False)
    assert library.exists() and not lock.exists() and builder.cached_library() == library
    assert f"removed the lock that a dead build left: {lock}" in capsys.readouterr().out


def build_in_child():
    builder._op_builder = FakeOp
    assert builder._build(False).exists()


def test_four_ranks_build_once(fresh):
    (builder.build_directory() / "lock").touch()  # with a dead lock in their way
    ranks = [multiprocessing.get_context("fork").Process(target=build_in_child) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert (builder.build_directory() / "builds").read_text() == "one\n"


def test_a_killed_holder_lets_go_and_a_live_ones_lock_stays(tmp_path, capsys):
    directory = tmp_path / "op"
    code = f"""
import os, time
from pathlib import Path
from sltrain_ds.ops import build_lock
with build_lock.exclusive(Path({str(directory)!r})):
    fd = os.open({str(directory / "lock")!r}, os.O_CREAT | os.O_EXCL)  # as torch/utils/file_baton.py does
    print("held", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    assert not build_lock.remove_dead(directory)  # the child lives
    assert (directory / "lock").exists()
    child.send_signal(signal.SIGKILL)
    child.wait()
    with build_lock.exclusive(directory) as owned:
        assert owned
        assert build_lock.remove_dead(directory)
    assert not (directory / "lock").exists()
    assert "dead build" in capsys.readouterr().out
    assert not build_lock.remove_dead(directory)  # nothing to do


def test_on_a_shared_file_system_a_young_lock_stays(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr(build_lock, "_is_remote", lambda path: True)
    assert not build_lock.remove_dead(tmp_path)
    os.utime(lock, (time.time() - 2 * build_lock.STALE_AFTER,) * 2)
    assert build_lock.remove_dead(tmp_path)


def test_dead_locks_of_deepspeeds_ops_are_cleared(fresh, capsys):
    for name in ("deepspeed_shm_comm", "fused_adam"):
        (fresh / name).mkdir()
    (fresh / "fused_adam" / "lock").touch()
    with open(fresh / "deepspeed_shm_comm" / "lock", "w"):  # somebody builds
        builder.clear_dead_locks()
        assert (fresh / "deepspeed_shm_comm" / "lock").exists()
    assert not (fresh / "fused_adam" / "lock").exists()
    assert capsys.readouterr().out.count("dead build") == 1


def test_a_real_build_through_deepspeeds_builder(tmp_path):
    # from nothing, with a dead lock in the way and ninja and python not on PATH; then found by the next process
    if builder.missing_tools():
        pytest.skip(builder.missing_tools())
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "CUDA_HOME": "/no/such/cuda"}
    env.pop("SLTRAIN_OPS", None)
    name = builder.extension_name()
    (tmp_path / name).mkdir()
    (tmp_path / name / "lock").touch()
    code = "from sltrain_ds.ops import builder; import torch; print(builder.load(), torch.ops.sltrain.scatter_add_)"
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert all(run.returncode == 0 and "True sltrain.scatter_add_" in run.stdout for run in runs), runs
    assert "removed the lock" in runs[0].stdout and "building the C++ ops" in runs[0].stdout
    assert "building" not in runs[1].stdout
    assert (tmp_path / name / f"{name}.so").exists()


def test_an_op_without_compiler_draws_the_same_support(monkeypatch):
    from sltrain_ds import SLTrainLinear

    torch.manual_seed(0)
    native = SLTrainLinear(24, 16, rank=2, density=0.2, alpha=4, layer_name="x").support_info()
    monkeypatch.setattr(builder, "_state", ("reference", "test"))
    assert SLTrainLinear(24, 16, rank=2, density=0.2, alpha=4, layer_name="x").support_info() == native


def test_ops_built_ahead_come_first(tmp_path):
    # a package laid out as after `SLTRAIN_BUILD_OPS=1 pip install`, its _C being this machine's cached library
    if builder.status()[0] != "jit" or not builder.load():
        pytest.skip("needs the ops from the extension cache")
    built, name = Path(builder.status()[1]), builder.extension_name()
    (tmp_path / "sltrain_ds").symlink_to(ROOT / "sltrain_ds")
    # the library's init function carries the extension's name, so import it under that name
    code = f"""
import importlib.machinery, importlib.util, sys

class Ahead:
    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname == "sltrain_ds.ops._C":
            loader = importlib.machinery.ExtensionFileLoader({name!r}, {str(built)!r})
            spec = importlib.util.spec_from_file_location({name!r}, {str(built)!r}, loader=loader)
            return spec

sys.meta_path.insert(0, Ahead)
from sltrain_ds.ops import builder
assert "torch" not in sys.modules
print(builder.status()[0], builder.load(), builder.status()[0])
"""
    env = {key: value for key, value in os.environ.items() if key != "SLTRAIN_OPS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["prebuilt", "True", "prebuilt"], done.stdout + done.stderr
