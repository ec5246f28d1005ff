"""Retrievers while exports replace and prune each other: no failure, no mixture of versions."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from offtower.atomic import replace_directory
from offtower.checksums import describe_files
from offtower.data.log import ParquetLog
from offtower.errors import RunError
from offtower.retrieval import ExportOptions, Retriever, retriever
from offtower.retrieval.manifest import (
    prune_versions,
    read_manifest,
    set_current,
    write_manifest,
)

ITEMS = 3000


def publish(source: Path, export: Path, number: int) -> None:
    """Make a version whose ids begin with its number and whose logits are (1 + number) times those
    of `source`, make it current, and prune all but the two newest versions."""
    factor = np.float32(1 + number)
    version = f"version-{number:04d}"
    with replace_directory(export / version) as folder:
        # Without the files for other readers.
        left_out = shutil.ignore_patterns("items", "*.pt2", "*.onnx")
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=left_out)
        for name in ("vectors.npy", "cells/vectors.npy"):
            np.save(folder / name, np.load(folder / name) * factor)
        with np.load(folder / "cells" / "moments.npz") as moments:
            power = {"mean": 1, "spread": 2, "covariance": 2, "mean_spread": 2, "always": 0}
            np.savez(
                folder / "cells" / "moments.npz",
                **{name: moments[name] * factor ** power[name] for name in moments},
            )
        schema = pa.schema([("item_id", pa.large_string())])
        ids = pa.array([f"{number}-{item}" for item in range(ITEMS)], pa.large_string())
        with pa.ipc.new_file(folder / "ids.arrow", schema) as writer:
            writer.write_batch(pa.record_batch([ids], schema=schema))
        for name in ("context_tower/tower.json", "index/index.json"):
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**content, "version": version}))
        manifest = read_manifest(source)
        files = describe_files(folder, (n for n in manifest["files"] if (folder / n).exists()))
        write_manifest(folder, {**manifest, "version": version, "files": files})
    set_current(export, version)
    prune_versions(export, kept=2, keep_seconds=0.0)


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    publish(exported, folder, 0)
    return folder


@pytest.fixture(scope="module")
def contexts(run: Path) -> pa.Table:
    return ParquetLog.open(run.parents[1] / "test").read_row_group(0).slice(0, 64)


class Answers:
    """Checks that an answer is wholly that of one version."""

    def __init__(self, exported: Path, contexts: pa.Table) -> None:
        self.contexts = contexts
        base = Retriever.open(exported).search(contexts, 5, exact=True)
        self.item, self.score = np.stack(base.item), np.stack(base.score)

    def check(self, opened: Retriever, row: int) -> None:
        number = int(opened.version.removeprefix("version-"))
        context = self.contexts.slice(row, 1)
        for exact in (True, False):
            found = opened.search(context, 5, exact=exact)
            assert found.item_id[0] == [f"{number}-{item}" for item in found.item[0]]
            if exact:
                assert found.item[0].tolist() == self.item[row].tolist()
                np.testing.assert_allclose(found.score[0], (1 + number) * self.score[row], 1e-4)
        drawn = opened.sample(context, 2, seed=row)
        assert drawn.version == opened.version
        assert drawn.item_id[0] == [f"{number}-{item}" for item in drawn.item[0]]


@pytest.mark.parametrize(
    ("replacements", "searches"),
    [(40, 2_000), pytest.param(200, 10_000, marks=pytest.mark.slow)],
)
def test_searches_against_replacements(
    exported: Path, export: Path, contexts: pa.Table, replacements: int, searches: int
) -> None:
    """Half of the searches go to a retriever of the first version, half to newly opened ones. The
    replacements are spread over the searches, and each prunes what is older than the last two."""
    answers = Answers(exported, contexts)
    first = Retriever.open(export)
    done, ended, errors = threading.Semaphore(0), threading.Event(), []

    def replace() -> None:
        try:
            for number in range(1, replacements + 1):
                for _ in range(searches // replacements):
                    done.acquire()
                publish(exported, export, number)
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    writer = threading.Thread(target=replace)
    writer.start()
    opened, seen, asked = first, set(), 0
    # A check asks three times.
    while asked < searches or not ended.is_set():
        if asked % 48 == 0:
            opened = Retriever.open(export)
            seen.add(opened.version)
        answers.check(first if asked % 2 else opened, asked % 64)
        done.release(3)
        asked += 3
    writer.join()
    assert not errors
    assert first.version == "version-0000" and not first.directory.exists()
    assert len(seen) > replacements // 5
    assert Retriever.open(export).version == f"version-{replacements:04d}"


@pytest.mark.parametrize("stage", ["read_manifest", "verify_files"])
def test_open_retries_with_the_new_version(
    exported: Path, export: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The version is replaced and pruned twice while it is opened."""
    original, calls = getattr(retriever, stage), []

    def replaced(directory: Path, *args: object) -> object:
        calls.append(directory.name)
        if len(calls) <= 2:
            for number in (10 * len(calls), 10 * len(calls) + 1):
                publish(exported, export, number)
            shutil.rmtree(directory, ignore_errors=True)
        return original(directory, *args)

    monkeypatch.setattr(retriever, stage, replaced)
    assert Retriever.open(export).version == "version-0021"
    assert calls == ["version-0000", "version-0011", "version-0021"]


def test_a_damaged_current_version_is_not_tried_again(export: Path) -> None:
    (export / "version-0000" / "ids.arrow").unlink()
    with pytest.raises(RunError, match=r"ids\.arrow' is missing"):
        Retriever.open(export)


def test_versions_are_pruned_by_number_and_age(tmp_path: Path) -> None:
    """Six versions, finished a minute apart in another order than that of their names."""
    names = ["f", "b", "e", "a", "d", "c"]
    for minute, name in enumerate(names):
        write_manifest_at(tmp_path / name, 60.0 * minute)
    (tmp_path / ".half.partial").mkdir()
    write_manifest_at(tmp_path / ".half.partial", 0.0)
    set_current(tmp_path, "c")
    os.utime(tmp_path / "CURRENT", (300.0, 300.0))

    def left() -> list[str]:
        return [n for n in names if (tmp_path / n).exists()]

    prune_versions(tmp_path, kept=10, keep_seconds=0.0)
    assert left() == names
    # f was replaced at minute 1, b at minute 2, e at minute 3: 240, 180 and 120 s ago.
    prune_versions(tmp_path, kept=2, keep_seconds=150.0)
    assert left() == ["e", "a", "d", "c"]
    # Rolled back: the current version stays although it is old.
    set_current(tmp_path, "e")
    os.utime(tmp_path / "CURRENT", (300.0, 300.0))
    prune_versions(tmp_path, kept=1, keep_seconds=0.0)
    assert left() == ["e", "c"]
    assert (tmp_path / ".half.partial").exists()


def test_folders_that_are_no_export_are_not_pruned(tmp_path: Path) -> None:
    """An `export` that links to a folder with other things must not lose them."""
    write_manifest_at(tmp_path / "current", 300.0)
    set_current(tmp_path, "current")
    for number in range(5):
        (tmp_path / f"project{number}").mkdir()
        (tmp_path / f"project{number}" / "manifest.json").write_text('{"name": "mine"}')
        os.utime(tmp_path / f"project{number}" / "manifest.json", (number, number))
    before = sorted(tmp_path.iterdir())
    prune_versions(tmp_path, kept=1, keep_seconds=0.0)
    assert sorted(tmp_path.iterdir()) == before


def write_manifest_at(folder: Path, seconds: float) -> None:
    folder.mkdir(exist_ok=True)
    write_manifest(folder, {})
    os.utime(folder / "manifest.json", (seconds, seconds))


def test_options() -> None:
    assert ExportOptions().keep_seconds >= 60.0
    with pytest.raises(ValueError, match="keep_seconds must not be negative"):
        ExportOptions(keep_seconds=-1.0)
