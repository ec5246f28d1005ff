"""Imports point one way (docs/architecture.md), and heavy extras stay where they belong."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
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
    "serving": {
        *("objectives", "prepare", "crossfit", "evaluation", "retrieval"),
        *("training", "jobs", "cli", "learner"),
    },
    "crossfit": {"sampling", "evaluation", "retrieval", "training", "jobs", "cli", "learner"},
    "evaluation": {"experiment", "monitoring", "training", "jobs", "cli", "learner"},
    "experiment": {"models", "objectives", "retrieval", "training", "jobs", "cli", "learner"},
    "training": {"jobs", "cli", "learner"},
    "embedding": {
        *("models", "objectives", "evaluation", "retrieval"),
        *("training", "jobs", "cli", "learner"),
    },
    "monitoring": {"training", "server", "jobs", "cli", "learner"},
    "retrieval": {"training", "monitoring", "server", "jobs", "cli", "learner"},
    "server": {"training", "evaluation", "jobs", "cli", "learner"},
    "jobs": {"cli", "learner"},
}
HOME_OF = {
    "obp": {"data"},
    "ray": {"jobs"},
    "faiss": {"retrieval"},
    "starlette": {"server"},
    "uvicorn": {"server"},
}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported_modules(path: Path) -> frozenset[str]:
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "offtower":
                found |= {f"offtower.{alias.name}" for alias in node.names}
    return frozenset(found)


@functools.cache
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


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            at = stack.index(node)
            if len(stack) > at + 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in order:
            visit(node)
    return found


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from at_import(other)
            continue
        yield child
        yield from at_import(child)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Each module of a package and those of its modules that must be imported before it.

    Imports within functions and under TYPE_CHECKING do not count. The package of an imported
    module does, since its __init__ runs first, unless the importing module is part of it.
    """
    paths = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        paths[".".join(parts).removesuffix(".__init__")] = path
    graph = {}
    for name, path in paths.items():
        found = set()
        for node in at_import(parsed(path)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level, f"{path}: relative import"
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {full if full in paths else node.module for full in inside}
        around = {
            ".".join(parts[:k])
            for parts in [other.split(".") for other in found]
            for k in range(1, len(parts))
        }
        found |= {package for package in around if not name.startswith(f"{package}.")}
        graph[name] = (found & set(paths)) - {name}
    return graph


def test_modules_form_no_import_cycle() -> None:
    graph = import_graph(PACKAGE)
    assert sum(map(len, graph.values())) > 1000
    assert cycles(graph) == []


def test_top_level_packages_form_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for name, imports in import_graph(PACKAGE).items():
        top = [other.split(".")[1] for other in (name, *imports) if other != "offtower"]
        if name != "offtower":
            graph.setdefault(top[0], set()).update(set(top[1:]) - {top[0]})
    assert {"data", "training", "learner"} <= set(graph)
    assert cycles(graph) == []


def test_import_cycles_are_found(tmp_path: Path) -> None:
    package = tmp_path / "shop"
    for folder in ("cart", "own"):
        (package / folder).mkdir(parents=True)
    files = {
        "__init__": "",
        "cart/__init__": "from shop.cart import lines",
        "cart/lines": "class Lines:\n    from shop.prices import of",
        "prices": "try:\n    import shop.taxes\nexcept ImportError:\n    pass",
        "taxes": "from shop import cart",
        "own/__init__": "from shop.own.part import name",
        "own/part": "from shop.own import name",
        "lazy": "import shop.typed\ndef late():\n    import shop.taxes",
        "typed": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import shop.lazy",
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    graph = import_graph(package)
    assert graph["shop.lazy"] == {"shop.typed"}
    assert graph["shop.typed"] == set()
    assert sorted(cycles(graph)) == [
        ["shop.cart", "shop.cart.lines", "shop.prices", "shop.taxes"],
        ["shop.own", "shop.own.part"],
    ]


@pytest.mark.parametrize("package", HOME_OF)
def test_optional_packages_are_imported_in_one_part_only(package: str) -> None:
    for path in modules():
        if any(name.split(".")[0] == package for name in imported_modules(path)):
            assert path.relative_to(PACKAGE).parts[0] in HOME_OF[package], path


def test_importing_offtower_is_light() -> None:
    """No optional package, and no plotting, comes in with `import offtower`, nor with the jobs."""
    code = (
        "import sys, offtower, offtower.jobs.connect; "
        "print([m for m in ('obp', 'ray', 'faiss', 'matplotlib', 'starlette') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
