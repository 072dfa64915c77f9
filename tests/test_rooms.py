"""Imports go one way: from the rooms below to those above, and never in a circle (docs/architecture.md)."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import sltrain_ds

ROOT = Path(sltrain_ds.__file__).parent
ORDER = (
    "__init__", "errors", "logs", "files", "formats", "extensions", "data", "ops", "methods", "config", "models",
    "optim", "memory", "zero", "checkpoint", "training", "hf", "report", "bench", "cli", "train",
)  # fmt: skip


def name_of(path: Path) -> str:
    return ".".join(["sltrain_ds", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imports(name: str) -> set[str]:
    """Modules of ours that a module imports anywhere, inside functions too."""
    found, package = set(), MODULES[name].name == "__init__.py"
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: len(name.split(".")) - node.level + package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return found & set(MODULES) - {name, "sltrain_ds"}


def room(name: str) -> str:
    return [*name.split("."), "__init__"][1]


def test_a_room_imports_from_those_above_it():
    upward = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imports(name)
        if ORDER.index(room(other)) > ORDER.index(room(name))
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    list(TopologicalSorter({name: imports(name) for name in MODULES}).static_order())  # CycleError names them
