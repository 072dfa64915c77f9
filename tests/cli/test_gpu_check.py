"""The check for a borrowed GPU: parts, limits and the files that tell; and the kit, against what the code imports."""

import ast
import json
import re
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ranks import ROOT

from sltrain_ds.cli import gpu_check
from sltrain_ds.cli import main as cli_main
from sltrain_ds.cli.gpu_check import Check, Part

PACKAGE = ROOT / "sltrain_ds"
KIT = (ROOT / "launch" / "gpu_kit.txt").read_text(encoding="utf-8").splitlines()
PINS = {canonicalize_name(name): version for name, version in (line.split("==") for line in KIT if "==" in line)}
NODE = {canonicalize_name(name) for line in KIT if line.startswith("# node: ") for name in line[8:].split()}


def python(code: str, name="part", limit=30.0, **more) -> Part:
    return Part(name, "something", limit, (sys.executable, "-c", code), **more)


def check(out, *parts, limit=100.0) -> tuple[int, dict]:
    code = Check(out, list(parts), limit, time.monotonic(), {"device": "a card"}).run()
    return code, json.loads((out / "results.json").read_text())


def test_every_part_is_told_whatever_becomes_of_it(tmp_path):
    table = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); "
    table += "(p / 'x.md').write_text('| 7 |'); (p / 'x.json').write_text('{\"cases\": [7]}')"
    good = Part("good", "a table", 30, (sys.executable, "-c", table, "{out}"))
    bad = python("print('why'); raise SystemExit(3)", "bad")
    absent = python("", "absent", needs="no-such-program")
    skipped = python("print('SKIPPED [2] needs the CUDA kernels: none')", "skipped", fails_on="SKIPPED.* CUDA kernels")
    code, found = check(tmp_path, good, bad, absent, skipped)
    verdicts = {part["name"]: part["verdict"] for part in found["parts"]}
    assert code == 1 and verdicts == {
        "good": "pass",
        "bad": "FAIL",
        "absent": "no no-such-program here",
        "skipped": "FAIL",
    }
    assert found["parts"][0]["found"] == {"x": {"cases": [7]}} and found["parts"][1]["output"] == ["why"]
    text = (tmp_path / "results.md").read_text()
    assert "- device: a card" in text and "| 7 |" in text and "why" in text
    assert "why" in (tmp_path / "log.txt").read_text()


def test_a_part_that_is_cut_keeps_what_it_had_and_leaves_no_process(tmp_path):
    code = "import subprocess, sys, time; print('begun', flush=True)\n"
    code += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    code += f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); time.sleep(600)"
    exit_code, found = check(tmp_path, python(code, limit=5.0))
    assert exit_code == 0 and found["parts"][0]["verdict"] == "cut at its limit"
    assert found["parts"][0]["output"] == ["begun"]
    stat = Path("/proc", (tmp_path / "child").read_text(), "stat")
    until = time.monotonic() + 60  # a killed process may still have to be scheduled once, to end
    while alive(stat) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(stat)


def alive(stat: Path) -> bool:
    try:
        return stat.read_text().split()[2] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_when_time_is_out_the_rest_is_named(tmp_path):
    code, found = check(tmp_path, python("", "first"), python("", "second"), limit=gpu_check.LEAST - 1)
    assert code == 0 and [part["verdict"] for part in found["parts"]] == ["no time", "no time"]


def test_results_lie_there_after_each_part(tmp_path):
    seen = tmp_path / "seen.md"
    code = f"import shutil; shutil.copy({str(tmp_path / 'results.md')!r}, {str(seen)!r})"
    check(tmp_path, python("", "first"), python(code, "second"), python("", "third"))
    assert re.search(r"\| first .*\| pass \|\n\| second .* not begun \|\n\| third .* not begun \|", seen.read_text())


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_parts_call_what_there_is(gpu, scale, tmp_path, monkeypatch, capsys):
    """Every command's options are understood, and its files are there."""
    found = gpu_check.parts(gpu, scale)
    assert [part.name for part in found[:3]] == ["doctor", "tests", "profile"]
    assert len({part.name for part in found}) == len(found)
    monkeypatch.chdir(ROOT)
    for part in found:
        words = list(part.command)
        assert all((ROOT / word).exists() for word in words if word.startswith(("tests/", "ds_configs/")))
        if words[: len(gpu_check.CLI)] == list(gpu_check.CLI):
            with pytest.raises(SystemExit) as stopped:  # options are read before --help
                cli_main([*words[len(gpu_check.CLI) :], "--help"])
            assert stopped.value.code == 0
    capsys.readouterr()


def test_shorter_checks_have_shorter_parts():
    full, short = (sum(part.limit for part in gpu_check.parts(True, scale)) for scale in (1.0, 0.5))
    assert short < full


def test_the_kits_wheels_and_the_node_are_all_that_is_required():
    """What setup.py asks for, and what that requires in turn on Linux and Python 3.12, is in the kit or on the node."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (asked,) = [ast.literal_eval(k.value) for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords
                if k.arg == "install_requires"]  # fmt: skip
    environment = {"python_version": "3.12", "python_full_version": "3.12.0", "extra": ""}
    wanted, seen = [(line, True) for line in [*asked, "pytest-timeout"]], set()
    while wanted:
        line, holds = wanted.pop()
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        if name in PINS:
            assert not holds or requirement.specifier.contains(PINS[name]), f"{requirement}: the kit has {PINS[name]}"
            if name not in seen:
                seen.add(name)
                same = metadata.version(name) == PINS[name]  # another version may ask for other versions
                wanted += [(line, same) for line in metadata.requires(name) or []]
        else:
            assert name in NODE, f"{requirement} is neither in launch/gpu_kit.txt nor on the node"
    assert set(PINS) == seen, f"nothing requires {set(PINS) - seen}"


def test_the_kit_holds_what_the_tests_ran_with():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for name, version in (line.split("==") for line in lines if "==" in line):
        assert PINS.get(name, version) == version


def test_the_code_imports_nothing_else():
    """Top-level names of every import of the package and of tests/gpu: our own, Python's, the kit's or the node's."""
    provides = metadata.packages_distributions()
    optional = {"apex"}  # looked for first
    own = {"sltrain_ds", "ranks", *sys.stdlib_module_names, *optional}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests" / "gpu").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - own:
                found = {canonicalize_name(distribution) for distribution in provides.get(name, [])}
                assert found & (NODE | set(PINS)), f"{path}: {name} of {found or 'no distribution here'}"
