"""Ingests that are killed between two folders, refused, or started twice."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from offtower.data import stores
from offtower.data.catalogue import Catalogue
from offtower.data.ingest import IngestSource, Split, files, ingest_files, writing
from offtower.data.lease import Lease
from offtower.data.location import AnyPath, Location
from offtower.data.log import ParquetLog
from offtower.data.schema import FeatureSpec, LogSchema
from offtower.data.validate import validate_log
from offtower.errors import DataError, LeaseError
from tests.mappers import content
from tests.stores import Unruly, unruly
from tests.training.distributed.processes import START

SCHEMA = LogSchema(context=(FeatureSpec(name="x", kind="numeric"),))
SPLIT = Split("row", (0.5, 0.5))
STORE = "test://ingest"


@pytest.fixture
def source(tmp_path: Path) -> IngestSource:
    rng = np.random.default_rng(0)
    table = {
        "x": rng.normal(size=400),
        "action": rng.integers(0, 5, 400),
        "reward": rng.integers(0, 2, 400).astype(float),
        "pscore": np.full(400, 0.2),
    }
    pq.write_table(pa.table(table), tmp_path / "source.parquet")
    return IngestSource(tmp_path / "source.parquet", SCHEMA)


def ingest_until(step: str, source: IngestSource, out: AnyPath, store: Path | None) -> None:
    """Ingest, and die where the function of that name would be called."""
    if store is not None:
        stores.mount(STORE, fs.PyFileSystem(Unruly(store)))
    for module in (files, writing):
        if hasattr(module, step):
            setattr(module, step, lambda *a, **k: os._exit(9))
    ingest_files(source, out, split=SPLIT)


def kill_in(step: str, source: IngestSource, out: AnyPath, store: Path | None = None) -> None:
    process = multiprocessing.get_context(START).Process(
        target=ingest_until, args=(step, source, out, store)
    )
    process.start()
    process.join()
    assert process.exitcode == 9


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("write_log", set()),
        ("write_catalogue", {"log"}),
        ("split_log", {"log", "catalogue"}),
    ],
)
def test_what_a_killed_ingest_left_is_removed_by_the_next(
    source: IngestSource,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    step: str,
    left: set[str],
) -> None:
    ingest_files(source, tmp_path / "whole", split=SPLIT)
    out = tmp_path / "out"
    kill_in(step, source, out)
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == left
    (out / ".log.1.ab.partial").mkdir()
    (out / ".split-x").mkdir()
    ingest_files(source, out, split=SPLIT)
    assert content(out) == content(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == [
        "catalogue",
        "log",
        "train",
        "validation",
    ]
    assert f"an earlier ingest into '{out}' was interrupted" in caplog.text


def test_a_folder_that_was_there_before_a_killed_ingest_stays(
    source: IngestSource, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "quarantine").mkdir(parents=True)
    (out / "quarantine" / "mine").write_text("precious")
    kill_in("write_catalogue", source, out)
    ingest_files(source, out)
    assert (out / "quarantine" / "mine").read_text() == "precious"


def test_a_killed_ingest_into_a_store(
    source: IngestSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    kill_in("write_catalogue", source, f"{STORE}/mine", store)
    unruly(monkeypatch, store, STORE.removeprefix("test://"))
    ingest_files(source, f"{STORE}/mine", split=SPLIT)
    ingest_files(source, tmp_path / "here", split=SPLIT)
    assert content(tmp_path / "store" / "mine") == content(tmp_path / "here")


def test_a_failed_catalogue_leaves_no_log(
    source: IngestSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_catalogue", full)
        with pytest.raises(OSError, match="No space"):
            ingest_files(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    ingest_files(source, tmp_path / "out")


def test_parts_that_exist_are_refused_before_anything_is_written(
    source: IngestSource, tmp_path: Path
) -> None:
    (tmp_path / "out" / "validation").mkdir(parents=True)
    with pytest.raises(DataError, match="validation' exists already"):
        ingest_files(source, tmp_path / "out", split=SPLIT)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["validation"]


def test_two_ingests_into_one_folder(source: IngestSource, tmp_path: Path) -> None:
    with (
        Lease.acquire(tmp_path / "out"),
        pytest.raises(LeaseError, match=r"is being written by process .* another --out"),
    ):
        ingest_files(source, tmp_path / "out")


def test_a_damaged_marker_is_named(source: IngestSource, tmp_path: Path) -> None:
    (Location.of(tmp_path) / ".ingest.json").write_bytes(b"{")
    with pytest.raises(DataError, match=r"\.ingest\.json' of an interrupted ingest is damaged"):
        ingest_files(source, tmp_path)


def test_a_log_without_the_column_pscore_has_no_propensities(
    source: IngestSource, tmp_path: Path
) -> None:
    """Only where the schema does not name another column, whose absence is a fault."""
    table = pq.read_table(source.log).drop_columns(["pscore"])
    pq.write_table(table, tmp_path / "blind.parquet")
    found = ingest_files(IngestSource(tmp_path / "blind.parquet", SCHEMA), tmp_path / "out")
    assert ParquetLog.open(tmp_path / "out" / "log").schema.pscore is None
    assert any("no propensities" in note for note in found.notes)
    named = replace(SCHEMA, pscore="propensity")
    with pytest.raises(DataError, match="propensity"):
        ingest_files(IngestSource(tmp_path / "blind.parquet", named), tmp_path / "other")


@pytest.mark.parametrize("kind", ["conditional", "slate"])
@pytest.mark.parametrize("longest", [1, 2])
def test_rounds_of_one_item_are_single_draws(tmp_path: Path, kind: Any, longest: int) -> None:
    """As `offtower search --sample -k 1` logs them: without items above, pscores are marginal."""
    position = [0] * 5 + list(range(longest))
    table = {
        "x": np.arange(len(position), dtype=float),
        "action": np.arange(len(position)) % 3,
        "reward": np.zeros(len(position)),
        "pscore": np.full(len(position), 0.25),
        "round": [*range(5), *[5] * longest],
        "position": position,
    }
    # One context a round.
    table["x"][5:] = 5.0
    pq.write_table(pa.table(table), tmp_path / "source.parquet")
    schema = replace(SCHEMA, round_id="round", position="position", pscore_kind=kind)
    source = IngestSource(tmp_path / "source.parquet", schema)
    ingest_files(source, tmp_path / "out", split=SPLIT)
    for name in ("log", "train", "validation"):
        path = tmp_path / "out" / name
        if not path.exists():
            continue
        found = ParquetLog.open(path)
        assert found.schema.pscore_kind == ("marginal" if longest == 1 else kind)
        assert found.schema.slates == (longest > 1)
    log = ParquetLog.open(tmp_path / "out" / "log")
    report = validate_log(log, Catalogue.open(tmp_path / "out/catalogue"))
    assert report.rows == len(position)
