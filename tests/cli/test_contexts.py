"""Contexts of a search as CSV, JSON, Parquet and Python values: equal values, equal answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from offtower.cli import app
from offtower.data.ingest import IngestSource, Split, ingest_files
from offtower.data.schema import FeatureSpec, LogSchema
from offtower.errors import DataError
from offtower.retrieval import Retriever

FEATURES = (
    FeatureSpec(name="age", kind="numeric"),
    FeatureSpec(name="zip", kind="category"),
    FeatureSpec(name="size", kind="category", encoding="hash", buckets=1000),
    FeatureSpec(name="tags", kind="bag"),
    FeatureSpec(name="taste", kind="vector"),
)
ZIPS = ["01234", "1234", "NA", "true"]
ROW = {"age": 31, "zip": "01234", "size": 5, "tags": ["7"], "taste": [1.7e9, 2]}


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module", params=["csv", "parquet"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text sizes (CSV) or integer ones (Parquet), whose answers differ by category."""
    folder = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)
    n = 240
    row = np.arange(n)
    table = pa.table(
        {
            "age": rng.integers(20, 60, n),
            "zip": [ZIPS[number] for number in row % 4],
            "size": 5 + row % 3,
            "tags": [["7"], ["007", "7"]] * (n // 2),
            "taste": [[1.7e9 + number, float(number % 5)] for number in row],
            "action": [f"item {number}" for number in rng.integers(0, 8, n)],
            "reward": rng.integers(0, 2, n),
            "pscore": np.full(n, 1 / 8),
        }
    )
    source = folder / f"log.{request.param}"
    if request.param == "csv":
        lists = {"tags": 3, "taste": 4}
        for name, index in lists.items():
            cells = [json.dumps(cell) for cell in table[name].to_pylist()]
            table = table.set_column(index, name, pa.array(cells))
        _write_csv(source, table)
    else:
        pq.write_table(table, source)
    schema = LogSchema(context=FEATURES)
    ingest_files(IngestSource(source, schema), folder / "log", split=Split("row"))
    config = {
        "name": "mine",
        "runs": str(folder / "runs"),
        "data": {
            part: str(folder / "log" / part)
            for part in ("train", "validation", "test", "catalogue")
        },
        "objective": {"name": "ips"},
        "training": {"epochs": 1, "batch_size": 64, "threads": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert call("train", str(folder / "config.yaml")).exit_code == 0
    assert call("export", str(folder / "runs" / "mine")).exit_code == 0
    return folder / "runs" / "mine"


def _write_csv(path: Path, table: pa.Table) -> None:
    lines = [",".join(table.column_names)]
    for row in table.to_pylist():
        cells = ["" if cell is None else str(cell) for cell in row.values()]
        lines.append(
            ",".join('"' + cell.replace('"', '""') + '"' if "[" in cell else cell for cell in cells)
        )
    path.write_text("\n".join(lines) + "\n")


def answer(run: Path, contexts: str) -> Any:
    found = call("search", str(run), "--contexts", contexts, "-k", "8", "--exact", "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)["contexts"]


def refused(run: Path, contexts: str) -> str:
    found = call("search", str(run), "--contexts", contexts)
    assert found.exit_code == 2, found.output
    return " ".join(found.output.split())


def test_the_same_context_in_any_file_has_one_answer(run: Path, tmp_path: Path) -> None:
    wanted = answer(run, json.dumps(ROW))
    lists = {name: json.dumps(ROW[name]) for name in ("tags", "taste")}
    _write_csv(tmp_path / "c.csv", pa.Table.from_pylist([{**ROW, **lists}]))
    pq.write_table(pa.Table.from_pylist([ROW]), tmp_path / "c.parquet")
    (tmp_path / "c.jsonl").write_text(json.dumps(ROW))
    for file in ("c.csv", "c.parquet", "c.jsonl"):
        assert answer(run, str(tmp_path / file)) == wanted, file
    python = Retriever.open(run).search(pa.Table.from_pylist([ROW]), 8, exact=True)
    assert python.item_id[0] == wanted[0]["items"]
    # The scores do depend on what is compared here.
    for change in ({"zip": "1234"}, {"size": 6}, {"tags": ["007"]}, {"taste": [1.7e9 + 9, 2]}):
        assert answer(run, json.dumps(ROW | change))[0]["score"] != wanted[0]["score"], change


@pytest.mark.parametrize("size", ["5", 5.0])
def test_a_hashed_category_as_text_and_as_a_number_is_one_value(run: Path, size: Any) -> None:
    wanted = answer(run, json.dumps(ROW))
    assert answer(run, json.dumps(ROW | {"size": size})) == wanted
    table = pa.Table.from_pylist([ROW | {"size": size}])
    found = Retriever.open(run).search(table, 8, exact=True)
    assert found.score[0].tolist() == wanted[0]["score"]


def test_a_category_that_looks_like_a_missing_value_is_one(run: Path, tmp_path: Path) -> None:
    lists = {name: json.dumps(ROW[name]) for name in ("tags", "taste")}
    scores = []
    for zip_code in ("NA", "true", ""):
        _write_csv(tmp_path / "c.csv", pa.Table.from_pylist([{**ROW, **lists, "zip": zip_code}]))
        scores.append(answer(run, str(tmp_path / "c.csv"))[0]["score"])
    for zip_code, score in zip(("NA", "true", None), scores, strict=True):
        assert answer(run, json.dumps(ROW | {"zip": zip_code}))[0]["score"] == score
    assert scores[0] != scores[2] and scores[1] != scores[2]


def test_a_value_of_another_kind_is_named(run: Path, tmp_path: Path) -> None:
    message = refused(run, json.dumps(ROW | {"age": "old"}))
    assert "feature 'age' is 'old' in row 0 (not a number), expected a number" in message
    message = refused(run, json.dumps([ROW, ROW | {"tags": 5}]))
    assert "'tags' is 5 in row 1, expected a list of text and whole numbers" in message
    message = refused(run, json.dumps(ROW | {"taste": ["a"]}))
    assert "'taste' is" in message and "expected a list of numbers" in message
    lists = {name: json.dumps(ROW[name]) for name in ("tags", "taste")}
    _write_csv(tmp_path / "c.csv", pa.Table.from_pylist([{**ROW, **lists, "age": "old"}]))
    message = refused(run, str(tmp_path / "c.csv"))
    assert "c.csv, line 2: column 'age' is 'old' (not a number), expected a number" in message
    message = refused(run, json.dumps([ROW, ROW | {"age": None}]))
    assert "context 1 has no finite embedding: feature 'age' is null" in message
    with pytest.raises(DataError, match="feature 'age' is 'old' in row 0"):
        Retriever.open(run).search(pa.Table.from_pylist([ROW | {"age": "old"}]), 3)
    with pytest.raises(DataError, match="feature 'size' holds"):
        Retriever.open(run).search(pa.Table.from_pylist([ROW | {"size": 5.5}]), 3)
