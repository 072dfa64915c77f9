import json
import sys

import pytest

from sltrain_ds.cli import doctor, main
from sltrain_ds.ops.cpu_level import LEVELS


def test_json_names_everything(capsys, monkeypatch):
    from sltrain_ds.ops import builder

    builder.load()
    monkeypatch.delenv("SLTRAIN_CPU", raising=False)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["versions"]) == set(doctor.SUPPORTED)
    assert found["ops"]["kind"] in ("prebuilt", "jit", "reference")
    assert found["cpu_level"] in LEVELS if found["ops"]["kind"] != "reference" else "no C++ ops" in found["cpu_level"]
    assert {"apex", "bitsandbytes", "accelerator", "warnings", "python", "sltrain_ds"} < set(found)


def test_text_shows_ops_in_ds_reports_columns(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "op name ............... installed .. compatible" in out
    assert any(line.startswith("sltrain_ops") and "[" in line for line in out.splitlines())
    assert "torch ....." in out and "apex ....." in out and "accelerator ....." in out


@pytest.mark.parametrize(
    "state, installed, compatible, told",
    [
        (("prebuilt", "/x/_C.so"), "[YES]", "[OKAY]", "built ahead of time: /x/_C.so"),
        (("jit", "/x/y.so"), "[NO]", "[OKAY]", "built at first use: /x/y.so"),
        (("reference", "no C++ compiler"), "[NO]", "[NO]", "the PyTorch reference serves: no C++ compiler"),
    ],
)
def test_the_three_states_of_the_ops(monkeypatch, capsys, state, installed, compatible, told):
    from sltrain_ds.ops import builder

    monkeypatch.setattr(builder, "_state", state)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("sltrain_ops"))
    assert f" {installed}." in line and line.endswith(compatible)
    assert any(told in line for line in lines)


def package(folder, name, *files):
    (folder / name).mkdir()
    for file in ("__init__.py", *files):
        (folder / name / file).parent.mkdir(exist_ok=True)
        (folder / name / file).write_text("raise AssertionError('doctor must not import it')\n")


def test_apex_is_told_from_its_namesake(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert doctor.apex().startswith("not installed")
    package(tmp_path, "apex")
    assert "another package called apex" in doctor.apex()
    package(tmp_path / "apex", "normalization", "fused_layer_norm.py")
    assert "without its CUDA extensions (amp_C, fused_layer_norm_cuda, xentropy_cuda)" in doctor.apex()
    for name in doctor.APEX_EXTENSIONS:
        (tmp_path / f"{name}.py").touch()
    assert doctor.apex() == "NVIDIA apex with its CUDA extensions"


@pytest.mark.parametrize(
    "version, warned",
    [
        ("2.13.0+cpu", False),
        ("2.11.0", False),
        ("2.15.0", False),
        ("2.16.0", True),
        ("2.10.1", True),
        ("2.16.0a0+git1", True),
        (None, True),
    ],
)
def test_versions_outside_the_range_are_warned_of(version, warned):
    good = {name: least for name, (least, _) in doctor.SUPPORTED.items()}
    lines = doctor.warnings({**good, "torch": version})
    assert bool(lines) == warned
    if warned:
        assert "torch" in lines[0] and "2.11 or later, below 2.16" in lines[0]


def test_the_ranges_are_setup_pys():
    from pathlib import Path

    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    for name, (least, below) in doctor.SUPPORTED.items():
        assert f'"{name}>={least}' + (f",<{below}" if below else "") + '"' in setup


def test_build_says_how_it_went(monkeypatch, capsys):
    from sltrain_ds.ops import builder

    monkeypatch.setattr(builder, "_state", None)
    monkeypatch.setenv("SLTRAIN_OPS", "reference")
    monkeypatch.setattr(builder, "build_deepspeed_ops", lambda: "deepspeed_shm_comm")
    assert main(["doctor", "--build", "--json"]) == 0  # asked for, so not a failure
    captured = capsys.readouterr()
    assert json.loads(captured.out)["built"]["ops"] == "reference: SLTRAIN_OPS=reference"
    assert "the PyTorch reference serves" in captured.err
    monkeypatch.delenv("SLTRAIN_OPS")
    monkeypatch.setattr(builder, "build_ahead", lambda verbose: ("reference", "the build failed"))
    monkeypatch.setattr(builder, "missing_tools", lambda: None)
    assert main(["doctor", "--build"]) == 1
    monkeypatch.setattr(builder, "missing_tools", lambda: "no C++ compiler")
    assert main(["doctor", "--build"]) == 0  # nothing to build with: the reference is what there is
