"""Messages and notes name configuration keys that exist and values that they accept."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import offtower
from offtower.config import Config, NewItemsConfig, apply_overrides, parse_config, to_dict

PACKAGE = Path(offtower.__file__).parent
MINIMAL = {"name": "a", "data": {"train": "log", "catalogue": "items"}, "objective": "ips"}
SECTIONS = sorted(f.name for f in fields(Config) if f.name not in ("name", "runs", "seed"))

_KEY = re.compile(rf"(?<![\w./:'-])(?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+(?:=[a-z_0-9.]+)?")
_FILES = (".json", ".safetensors", ".parquet", ".yaml", ".py", ".html")
_HOLE = "\0"
"""Stands for what a message fills in."""


def texts(path: Path) -> Iterator[str]:
    """The strings of a module, without docstrings; formatted ones with holes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            skipped.update(id(part) for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(v.value) if isinstance(v, ast.Constant) else _HOLE for v in node.values]
            yield "".join(parts)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in skipped
        ):
            yield node.value


def named_keys(folder: Path) -> set[tuple[str, str]]:
    """(file, "section.key" or "section.key=value") of every text below a folder."""
    found = set()
    for path in sorted(folder.rglob("*.py")):
        for text in texts(path):
            for match in _KEY.finditer(text):
                key = match[0].rstrip(".")
                if not key.endswith(_FILES):
                    found.add((str(path.relative_to(PACKAGE)), key))
    return found


def exists(key: str) -> bool:
    place: object = to_dict(parse_config(MINIMAL))
    for part in key.split("."):
        if not isinstance(place, dict) or part not in place:
            return False
        place = place[part]
        if part == "reward_model" and place is None:  # evaluation.reward_model
            place = to_dict(parse_config(MINIMAL))["reward_model"]
        if part == "new_items" and place is None:  # a section of no defaults
            place = {one.name: one for one in fields(NewItemsConfig)}
    return True


def test_named_keys_exist() -> None:
    found = {(file, key.partition("=")[0]) for file, key in named_keys(PACKAGE)}
    assert len({key for _, key in found}) > 40
    assert {(file, key) for file, key in found if not exists(key)} == set()


def test_named_values_are_accepted() -> None:
    found = {(file, key) for file, key in named_keys(PACKAGE) if "=" in key}
    assert len({key for _, key in found}) > 12
    for _, key in sorted(found):
        parse_config(apply_overrides(MINIMAL, [key]), source=key)


def test_what_evaluate_says_can_be_set_when_evaluating() -> None:
    """`evaluate --set` accepts keys of the section evaluation only; --log replaces logs' paths."""
    keys = {key for _, key in named_keys(PACKAGE / "evaluation")}
    assert len(keys) > 10
    others = {key for key in keys if not key.startswith("evaluation.")}
    assert others <= {"data.test", "data.validation"}


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("set training.epochs=5, or", {"training.epochs=5"}),
        ("(evaluation.gate.min_rows).", {"evaluation.gate.min_rows"}),
        ("offtower.training.run and a/policy.json and runs.x", set()),
    ],
)
def test_keys_are_found_in_texts(tmp_path: Path, text: str, keys: set[str]) -> None:
    found = {key for key in map(str, _KEY.findall(text)) if not key.endswith(_FILES)}
    assert found == keys
    assert not exists("training.epoch") and exists("evaluation.reward_model.kind")
