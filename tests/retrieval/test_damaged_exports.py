"""Damaged exports, and those whose files name others, are refused with the file's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from offtower.errors import RunError
from offtower.retrieval import Retriever
from offtower.retrieval.manifest import read_manifest, write_manifest


def damaged(exported: Path, tmp_path: Path) -> Path:
    copy = tmp_path / exported.name
    shutil.copytree(exported, copy)
    return copy


@pytest.mark.parametrize("name", ["vectors.npy", "ids.arrow", "index/index.faiss"])
def test_truncated_and_corrupted_files(exported: Path, tmp_path: Path, name: str) -> None:
    copy = damaged(exported, tmp_path)
    content = bytearray((copy / name).read_bytes())
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match="is truncated"):
        Retriever.open(copy)
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(RunError, match="is corrupted"):
        Retriever.open(copy)
    (copy / name).unlink()
    with pytest.raises(RunError, match="is missing"):
        Retriever.open(copy)


def test_a_changed_manifest_a_wrong_dimension_and_another_version(
    exported: Path, tmp_path: Path
) -> None:
    copy = damaged(exported, tmp_path)
    manifest = read_manifest(copy)
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"count": 3000', '"count": 2999'))
    with pytest.raises(RunError, match="was changed"):
        Retriever.open(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        Retriever.open(copy)
    manifest.pop("format")
    wrong = {**manifest, "vectors": {**manifest["vectors"], "dim": 12}}
    write_manifest(copy, wrong)
    with pytest.raises(RunError, match="gives 13 numbers, the items have 12"):
        Retriever.open(copy)
    facts = json.loads((copy / "index" / "index.json").read_text())
    (copy / "index" / "index.json").write_text(json.dumps({**facts, "version": "older"}))
    other = {name: f for name, f in manifest["files"].items() if name != "index/index.json"}
    write_manifest(copy, {**manifest, "files": other})
    with pytest.raises(RunError, match="is of version older"):
        Retriever.open(copy)


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", "a\nb", ""])
@pytest.mark.parametrize("listed", ["files", "vectors"])
def test_names_that_leave_the_export_are_refused(
    exported: Path, tmp_path: Path, name: str, listed: str
) -> None:
    copy = damaged(exported, tmp_path)
    manifest = read_manifest(copy)
    if listed == "files":
        manifest["files"] = {name: {"bytes": 0, "sha256": ""}, **manifest["files"]}
    else:
        manifest["vectors"]["files"] = [name]
    write_manifest(copy, manifest)
    with pytest.raises(RunError, match=r"manifest\.json' names the file .* not a plain relative"):
        Retriever.open(copy)


@pytest.mark.parametrize("version", ["..", "../export", "/", "", "a\x1b[2J"])
def test_a_current_version_outside_the_export_is_refused(
    exported: Path, tmp_path: Path, version: str
) -> None:
    shutil.copytree(exported, tmp_path / "export" / exported.name)
    (tmp_path / "export" / "CURRENT").write_text(version)
    with pytest.raises(RunError, match="CURRENT' names"):
        Retriever.open(tmp_path / "export")


DAMAGES = {
    "not UTF-8": b"\xff\xfe{}",
    "not JSON": b'{"version": ',
    "no object": b"[]",
    "deep": b"[" * 100_000,
    "empty": b"",
    "no content": b"{}",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "index/index.json",
        "context_tower/tower.json",
        "context_tower/encoding/encoding.json",
    ],
)
def test_damaged_text_files_are_named(
    exported: Path, tmp_path: Path, name: str, damage: str
) -> None:
    """Also where the manifest has the damaged file's checksum."""
    copy = damaged(exported, tmp_path)
    assert (copy / name).exists()
    (copy / name).write_bytes(DAMAGES[damage])
    if name != "manifest.json":
        with pytest.raises(RunError, match=Path(name).name):
            Retriever.open(copy)
        manifest = read_manifest(copy)
        manifest["files"].pop(name)
        write_manifest(copy, manifest)
    with pytest.raises(RunError, match=Path(name).name):
        Retriever.open(copy)


def test_a_manifest_without_its_parts_is_damaged(exported: Path, tmp_path: Path) -> None:
    copy = damaged(exported, tmp_path)
    manifest = read_manifest(copy)
    for change in ({"vectors": None}, {"files": {"ids.arrow": {}}}, {"version": None}):
        write_manifest(copy, {**manifest, **change})
        with pytest.raises(RunError):
            Retriever.open(copy)
    for key in ("vectors", "files", "cells", "index"):
        write_manifest(copy, {k: v for k, v in manifest.items() if k != key})
        with pytest.raises(RunError, match=r"manifest\.json' is damaged"):
            Retriever.open(copy)
    (copy.parent / "CURRENT").write_bytes(b"\xff")
    with pytest.raises(RunError, match="CURRENT' is damaged"):
        Retriever.open(copy.parent)
