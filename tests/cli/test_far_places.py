"""The verbs with addresses in place of paths: the files and numbers of paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from offtower.cli import app
from offtower.data import copies
from offtower.data.location import Location
from tests.stores import unruly

RUNNER = CliRunner()
SCHEMA = {
    "log": {
        "context": [{"name": "age", "kind": "numeric"}],
        "action": "item",
        "reward": "click",
        "pscore": "p",
        "timestamp": "time",
    },
    "catalogue": {"item_id": "item_id", "features": [{"name": "price", "kind": "numeric"}]},
}


def call(*arguments: object) -> Result:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(copies.FOLDER, str(tmp_path / "cache"))
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    return tmp_path


def clicks(rows: int, bad: tuple[int, ...] = ()) -> str:
    lines = ["age,item,click,p,time"]
    for i in range(rows):
        lines.append(f"{20 + i % 50},item-{i % 6},{i % 2},{7 if i in bad else 0.25},{i}")
    return "\n".join(lines) + "\n"


def test_ingest_from_and_to_a_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CSV files, a bad row set aside, a split; the source cannot be read at its first try."""
    handler, root = unruly(monkeypatch, folder / "store")
    for place in (folder / "source", folder / "store" / "source"):
        place.mkdir(parents=True)
        (place / "a.csv").write_text(clicks(900, bad=(5,)))
        (place / "b.csv").write_text(clicks(300))
        (place.parent / "items.csv").write_text(
            "item_id,price\n" + "".join(f"item-{i},{i}.5\n" for i in range(6))
        )
    tried: set[str] = set()

    def fail(path: str) -> None:
        if path not in tried:
            tried.add(path)
            raise OSError("AWS Error SLOW_DOWN during GetObject operation")

    handler.before = fail
    options = ("--schema", folder / "schema.yaml", "--split", "time", "--json")
    options = (*options, "--on-bad-rows", "quarantine")
    monkeypatch.chdir(folder)
    here = call("ingest", "source", "--catalogue", "items.csv", "--out", "out", *options)
    items = ("--catalogue", f"{root}/items.csv")
    there = call("ingest", f"{root}/source", *items, "--out", f"{root}/out", *options)
    assert (here.exit_code, there.exit_code) == (0, 0), here.output + there.output
    told = json.loads(there.stdout[there.stdout.index("{") :])
    assert told["log"] == f"{root}/out/log" and told["quarantined"] == 1
    one, two = content(folder / "out"), content(folder / "store" / "out")
    for files in (one, two):  # The name of a quarantined file has the source in it.
        assert len([files.pop(name) for name in list(files) if "quarantine" in name]) == 1
    assert two == one
    found = call("validate", f"{root}/out/train", "--catalogue", f"{root}/out/catalogue")
    assert found.exit_code == 0, found.output
    again = call("ingest", f"{root}/source", "--out", f"{root}/out", *options)
    assert again.exit_code == 2 and "exists already" in again.output


def test_simulate_into_a_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, root = unruly(monkeypatch, folder / "store")
    options: tuple[Any, ...] = ("--items", 20, "--rows", 300, "--json")
    assert call("simulate", "--out", folder / "out", *options).exit_code == 0
    done = call("simulate", "--out", f"{root}/out", *options)
    assert done.exit_code == 0, done.output
    assert content(folder / "store" / "out") == content(folder / "out")
    again = call("simulate", "--out", f"{root}/out", *options)
    assert again.exit_code == 2 and "exists already" in again.output


def test_errors_of_missing_remote_files_name_the_address(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    _, root = unruly(monkeypatch, folder / "store")
    (folder / "store" / "source").mkdir()
    for source in ("nothing", "source"):
        done = call(
            *("ingest", f"{root}/{source}", "--out", folder / "x"),
            *("--schema", folder / "schema.yaml"),
        )
        assert done.exit_code == 2 and f"{root}/{source}" in done.output.replace("\n", "")
    done = call("validate", "s3:/bucket/log", "--catalogue", "x")
    assert done.exit_code == 2 and "cut short" in done.output
    assert not Location.of(folder / "x").exists()
