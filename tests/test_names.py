"""Sizes that keep the project readable: of tests' names, source files, the README and the package's top."""

import ast

from ranks import ROOT

PACKAGE = ROOT / "sltrain_ds"


def test_names_of_tests_have_at_most_80_characters():
    long = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > 80
    ]
    assert not long


def test_source_files_have_at_most_350_lines():
    sources = [*PACKAGE.rglob("*.py"), *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert len(lines) > 100 and not {path: count for path, count in lines.items() if count > 350}


def test_the_readme_is_short_and_narrow():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150 and not [line for line in lines if len(line) > 100]


def test_the_package_has_at_most_8_modules_at_its_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 8
