"""Imports point one way (docs/architecture.md), and heavy extras stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import offtower

PACKAGE = Path(offtower.__file__).parent

FORBIDDEN = {
    "ops": {
        "data",
        "models",
        "sampling",
        "objectives",
        "evaluation",
        "retrieval",
        "training",
        "jobs",
        "cli",
        "learner",
        "config",
    },
    "data": {"models", "objectives", "evaluation", "training", "jobs", "cli", "learner", "config"},
    "sampling": {"objectives", "evaluation", "training", "jobs", "cli", "learner", "config"},
    "objectives": {
        *("data", "models", "prepare", "crossfit"),
        *("evaluation", "training", "jobs", "cli", "learner"),
    },
    "models": {
        *("sampling", "objectives", "prepare", "crossfit"),
        *("evaluation", "training", "jobs", "cli", "learner"),
    },
    "crossfit": {"sampling", "evaluation", "retrieval", "training", "jobs", "cli", "learner"},
    "evaluation": {"training", "jobs", "cli", "learner"},
    "training": {"jobs", "cli", "learner"},
    "retrieval": {"training", "jobs", "cli", "learner"},
    "jobs": {"cli", "learner"},
}
HOME_OF = {"obp": {"data"}, "ray": {"jobs"}, "faiss": {"retrieval"}}


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "offtower":
                found |= {f"offtower.{alias.name}" for alias in node.names}
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_point_one_way(part: str) -> None:
    files = [p for p in modules() if p.relative_to(PACKAGE).parts[0] == part]
    assert files
    for path in files:
        for name in imported_modules(path):
            if name.startswith("offtower."):
                target = name.split(".")[1]
                assert target not in FORBIDDEN[part], f"{path.name} of {part} imports {name}"


def test_training_modules_form_no_cycle() -> None:
    """Of the modules that training is made of, each imports only ones that import it in no way."""
    names = {}
    for path in modules():
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] in ("prepare", "models", "objectives", "crossfit", "training"):
            names[".".join(("offtower", *parts)).removesuffix(".__init__")] = path
    remaining = {
        name: {other for other in imported_modules(path) if other in names and other != name}
        for name, path in names.items()
    }
    assert len(remaining) > 40
    while free := [name for name, imports in remaining.items() if not imports & set(remaining)]:
        for name in free:
            del remaining[name]
    assert not remaining, f"import cycles among {sorted(remaining)}"


@pytest.mark.parametrize("package", HOME_OF)
def test_optional_packages_are_imported_in_one_part_only(package: str) -> None:
    for path in modules():
        if any(name.split(".")[0] == package for name in imported_modules(path)):
            assert path.relative_to(PACKAGE).parts[0] in HOME_OF[package], path


def test_importing_offtower_is_light() -> None:
    """No optional package, and no plotting, comes in with `import offtower`, nor with the jobs."""
    code = (
        "import sys, offtower, offtower.jobs.connect; "
        "print([m for m in ('obp', 'ray', 'faiss', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
