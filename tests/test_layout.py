"""The budgets of lines, and the one way of imports: scripts, parity, gallery, the files that users copy."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest
from conftest import ROOT

COPIED = ["sdxl_comfy_pipeline", "flux_comfy_pipeline", "scheduling_k_diffusion", "comfy_ksampler"]
LINES = dict(zip([f"{name}.py" for name in COPIED], (600, 565, 605, 450)))
LINES |= {"gallery/*.py": 1800, "parity/*.py": 2750, "tests/**/*.py": 9000, "benchmarks/*.py": 1500, "README.md": 220}
LINES["CONTRIBUTING.md"] = 50
# who may import whom of this project, besides neighbours in the same folder
USES = {"parity": ["gallery", *COPIED], "gallery": COPIED}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("gallery/*.py"), *ROOT.glob("parity/*.py")]


def imported(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import of this project in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] in {*USES, *COPIED, "demo", "tests"}]


LINES |= {path.relative_to(ROOT).as_posix(): 400 for path in FILES if path.stem not in COPIED}


@pytest.mark.parametrize("name", LINES)
def test_budget(name):
    assert sum(len(path.read_text().splitlines()) for path in ROOT.glob(name)) <= LINES[name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    folder = path.parent.name if path.parent != ROOT else path.stem
    allowed = {*USES.get(folder, []), folder} if folder in (*USES, *COPIED) else {*USES, *COPIED}
    for module, name in imported(path):
        assert module.split(".")[0] in allowed, f"{module} in {path.name}"
        assert not name.startswith("_"), f"{name} is {module}'s own"


def test_no_circle():
    """Neighbours in a folder import each other in one direction, whether at the top or in a function."""
    for folder in USES:
        uses = {
            f"{folder}.{path.stem}": {module for module, _ in imported(path) if module.startswith(folder)}
            for path in ROOT.glob(f"{folder}/*.py")
        }
        graphlib.TopologicalSorter(uses).prepare()  # CycleError names a circle
