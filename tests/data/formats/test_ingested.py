"""Logs as teams have them, from the file to the ingested log."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from offtower.data.check import BadRowsError
from offtower.data.formats import csv_files, json_lines
from offtower.data.formats.options import FileFormat, SourceFormats
from offtower.data.ingest import IngestSource, IngestSummary, ingest_files
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.errors import DataError
from tests.mappers import BACKWARDS
from tests.mappers import content as content_of
from tests.stores import failing_reads, unruly

SCHEMA = LogSchema(
    context=(
        FeatureSpec(name="age", kind="numeric"),
        FeatureSpec(name="zip", kind="category"),
    ),
    timestamp="time",
    user_id="user",
)
HEADER = "user,age,zip,action,reward,pscore,time"
ITEMS = "item_id,price\n007,1.5\n7,2\n12,3\n"


def rows(number: int) -> list[str]:
    items = ["007", "7", "12"]
    return [
        f"u{row % 5},{20 + row % 30},0{row % 3}234,{items[row % 3]},{row % 2},0.5,{row}"
        for row in range(number)
    ]


def ingest(folder: Path, log: Path | str, **options: Any) -> IngestSummary:
    """Ingest a log with three items."""
    (folder / "items.csv").write_text(ITEMS)
    formats = options.pop("formats", None)
    schema = options.pop("schema", SCHEMA)
    features = CatalogueSchema(features=(FeatureSpec(name="price", kind="numeric"),))
    source = IngestSource(
        log,
        schema,
        options.pop("items", folder / "items.csv"),
        features,
        formats or SourceFormats(),
    )
    return ingest_files(source, folder / "out", **options)


def write(folder: Path, lines: list[str], name: str = "log.csv") -> Path:
    (folder / name).write_text("\n".join([HEADER, *lines]) + "\n")
    return folder / name


def table_of(folder: Path, part: str = "log") -> dict[str, list[Any]]:
    return pq.read_table(folder / "out" / part).to_pydict()


def test_ids_and_categories_keep_their_leading_zeros(tmp_path: Path) -> None:
    found = ingest(tmp_path, write(tmp_path, rows(9)))
    assert (found.rows, found.items) == (9, 3)
    assert table_of(tmp_path)["action"] == ["007", "7", "12"] * 3
    assert table_of(tmp_path)["zip"][:3] == ["00234", "01234", "02234"]
    assert table_of(tmp_path, "catalogue")["item_id"] == ["007", "7", "12"]


def test_items_that_the_log_shows_keep_their_zeros(tmp_path: Path) -> None:
    found = ingest_files(IngestSource(write(tmp_path, rows(9)), SCHEMA), tmp_path / "out")
    assert found.items == 3
    assert table_of(tmp_path, "catalogue")["item_id"] == ["007", "12", "7"]


def test_a_late_value_of_another_type_is_one_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 4096)
    lines = rows(3000)
    lines[1999] = "u1,unknown,01234,7,0,0.5,1999"
    lines[2500] = "u1,33.5,01234,7,0,0.5,2500"
    log = write(tmp_path, lines)
    with pytest.raises(BadRowsError) as caught:
        ingest(tmp_path, log)
    (bad,) = caught.value.rows
    assert (bad.line, bad.row, bad.column, bad.value) == (2001, 1999, "age", "'unknown'")
    assert f"{log}, line 2001, row 1999 of the log: column 'age' is 'unknown'" in str(bad)
    assert "expected a number" in str(bad)
    found = ingest(tmp_path, log, on_bad_rows="quarantine")
    assert (found.rows, found.quarantined) == (2999, 1)
    aside = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
    assert [(row["_row"], row["user"], row["age"]) for row in aside] == [(1999, "u1", None)]
    assert "'unknown'" in aside[0]["_reason"] and "line 2001" in aside[0]["_reason"]
    assert table_of(tmp_path)["age"][2499] == 33.5


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    lines = rows(6)
    lines[1] = 'u1,21,"two\n""lines""\nmore",7,0,0.5,1'
    lines.insert(3, "")
    lines[-1] = "u1,x,01234,7,0,0.5,5"
    with pytest.raises(BadRowsError) as caught:
        ingest(tmp_path, write(tmp_path, lines))
    (bad,) = caught.value.rows
    text = (tmp_path / "log.csv").read_text().split("\n")
    assert bad.row == 5 and bad.line is not None
    assert text[bad.line - 1] == lines[-1]


def test_a_quote_that_is_never_closed_is_refused(tmp_path: Path) -> None:
    """pyarrow reads the rest of the file as one cell, here of a column that is not used."""
    lines = [f"{line},note" for line in rows(50)]
    lines[20] = lines[20].replace("note", '"note')
    (tmp_path / "log.csv").write_text("\n".join([f"{HEADER},note", *lines]) + "\n")
    with pytest.raises(DataError, match=r"log\.csv', line 22: a quote is opened and never closed"):
        ingest(tmp_path, tmp_path / "log.csv")
    plain = SourceFormats(log=FileFormat(quote=None))
    assert ingest(tmp_path, tmp_path / "log.csv", formats=plain).rows == 50


@pytest.mark.parametrize("place", [0, 500, 999])
def test_rows_with_other_numbers_of_cells_are_bad_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 2048)
    lines = rows(1000)
    lines[place] = "u1,20,01234"
    lines[700] += ",more"
    log = write(tmp_path, lines)
    with pytest.raises(BadRowsError) as caught:
        ingest(tmp_path, log)
    first = min(place, 700)
    bad = caught.value.rows[0]
    assert (bad.row, bad.line) == (first, first + 2)
    assert "cells), expected 7 cells, as the header has" in str(bad)
    found = ingest(tmp_path, log, on_bad_rows="quarantine")
    assert (found.rows, found.quarantined) == (998, 2)
    kept = [row for row in range(1000) if row not in (place, 700)]
    assert table_of(tmp_path)["time"] == kept
    reasons = pq.read_table(tmp_path / "out" / "quarantine").to_pydict()
    assert sorted(reasons["_row"]) == sorted({place, 700})
    assert any("'u1,20,01234'" in reason for reason in reasons["_reason"])


def test_ids_in_the_form_of_another_type_are_bad_rows(tmp_path: Path) -> None:
    log = write(tmp_path, rows(9))
    items = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": [7, 12], "price": [1.0, 2.0]}), items)
    with pytest.raises(BadRowsError, match=r"'007' .*expected a whole number"):
        ingest(tmp_path, log, items=items)
    found = ingest(tmp_path, log, items=items, on_bad_rows="quarantine")
    assert (found.rows, found.quarantined) == (6, 3)
    assert table_of(tmp_path)["action"] == [7, 12] * 3


def test_ids_as_pandas_writes_them_beside_missing_ones(tmp_path: Path) -> None:
    lines = [line.replace(",7,", ",7.0,") for line in rows(3)]
    with pytest.raises(BadRowsError, match=r"(?s)'7\.0' \(an unknown item\).*Int64"):
        ingest(tmp_path, write(tmp_path, lines))
    # In Parquet the type says that 7.0 is the integer 7.
    table: dict[str, Any] = dict(zip(HEADER.split(","), _columns(rows(3)), strict=True))
    table["action"] = [7.0, 12.0, 7.0]
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    assert ingest(tmp_path, tmp_path / "log.parquet").rows == 3
    assert table_of(tmp_path)["action"] == ["7", "12", "7"]


def _columns(lines: list[str]) -> list[list[str]]:
    return [list(column) for column in zip(*(line.split(",") for line in lines), strict=True)]


def as_tsv(lines: list[str]) -> tuple[str, bytes, dict[str, Any]]:
    return "log.tsv", "\n".join(lines).replace(",", "\t").encode(), {}


def as_semicolons(lines: list[str]) -> tuple[str, bytes, dict[str, Any]]:
    return "log.csv", "\n".join(lines).replace(",", ";").encode(), {"delimiter": ";"}


def as_gzip(lines: list[str]) -> tuple[str, bytes, dict[str, Any]]:
    return "log.csv.gz", gzip.compress("\n".join(lines).encode()), {}


def as_spaced(lines: list[str]) -> tuple[str, bytes, dict[str, Any]]:
    return "log.csv", "\n".join(lines).replace(",", ", ").encode(), {"trim": True}


def as_comma(lines: list[str]) -> tuple[str, bytes, dict[str, Any]]:
    text = "\n".join(lines).replace(",0.5,", ',"0,5",')
    return "log.csv", text.encode(), {"decimal": ","}


def as_german(lines: list[str]) -> tuple[str, bytes, dict[str, Any]]:
    times = [f"01.01.1970 00:{int(line.rpartition(',')[2]):02d}" for line in lines[1:]]
    text = [
        f"{line.rpartition(',')[0]},{time}" for line, time in zip(lines[1:], times, strict=True)
    ]
    return "log.csv", "\n".join([lines[0], *text]).encode(), {"time": "%d.%m.%Y %H:%M"}


def as_json(lines: list[str]) -> tuple[str, bytes, dict[str, Any]]:
    numbers = ("age", "reward", "pscore", "time")
    objects = []
    for line in lines[1:]:
        row: dict[str, Any] = dict(zip(HEADER.split(","), line.split(","), strict=True))
        objects.append(json.dumps(row | {name: float(row[name]) for name in numbers}))
    return "log.jsonl", "\n".join(objects).encode(), {}


@pytest.mark.parametrize(
    "form", [as_tsv, as_semicolons, as_gzip, as_spaced, as_comma, as_german, as_json]
)
def test_other_forms_give_the_same_log(tmp_path: Path, form: Any) -> None:
    ingest(tmp_path, write(tmp_path, rows(12)))
    wanted = table_of(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    name, content, options = form([HEADER, *rows(12)])
    (other / name).write_bytes(content)
    formats = SourceFormats(log=FileFormat(**options))
    assert ingest(other, other / name, formats=formats).rows == 12
    found = table_of(other)
    if form is as_german:
        # Minutes of that day, as times.
        found["time"] = [time.minute for time in found["time"]]
    assert found == wanted


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (as_semicolons, "set format.delimiter: ';'"),
        (as_spaced, "set format.trim: true"),
        (as_comma, r"line 2, row 0 .*column 'pscore' is '0,5'.*format\.decimal"),
        (as_german, r"column 'time' is '01\.01\.1970 00:00'.*format\.time"),
    ],
)
def test_refusals_name_the_key_that_reads_the_file(tmp_path: Path, form: Any, message: str) -> None:
    name, content, _ = form([HEADER, *rows(3)])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        ingest(tmp_path, tmp_path / name)


def test_lines_of_json_that_are_none_are_bad_rows(tmp_path: Path) -> None:
    _, content, _ = as_json([HEADER, *rows(4)])
    lines = content.decode().split("\n")
    lines[1] = lines[1].replace('"action": "7"', '"action": 7')
    lines[2] = '{"user": '
    lines[3] = lines[3].replace('"age": 23.0', '"age": [23]')
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    with pytest.raises(BadRowsError) as caught:
        ingest(tmp_path, log)
    found = [(bad.row, bad.line, bad.column, bad.problem) for bad in caught.value.rows]
    assert found == [(2, 4, "", "no object"), (3, 5, "age", "of another kind")]
    assert ingest(tmp_path, log, on_bad_rows="quarantine").rows == 2
    assert table_of(tmp_path)["action"] == ["007", "7"]


def test_half_the_times_without_a_zone(tmp_path: Path) -> None:
    ends = ["2026-01-01T00:00:39+01:00", "2026-01-01 00:00:53", "2026-01-01T00:00:58+01:00"]
    lines = [f"{line.rpartition(',')[0]},{end}" for line, end in zip(rows(3), ends, strict=True)]
    log = write(tmp_path, lines)
    with pytest.raises(BadRowsError, match=r"line 3.*with a time zone.*format\.zone") as caught:
        ingest(tmp_path, log)
    assert [bad.row for bad in caught.value.rows] == [1]
    berlin = SourceFormats(log=FileFormat(zone="Europe/Berlin"))
    assert ingest(tmp_path, log, formats=berlin).rows == 3
    seconds = [time.second for time in table_of(tmp_path)["time"]]
    assert seconds == [39, 53, 58]


def test_a_header_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"log\.csv' has no rows"):
        ingest(tmp_path, write(tmp_path, []))
    (tmp_path / "nothing.csv").write_text("")
    with pytest.raises(DataError, match=r"nothing\.csv' cannot be read as csv: Empty CSV file"):
        ingest(tmp_path, tmp_path / "nothing.csv")


def test_epoch_seconds_stay_numbers_or_become_times(tmp_path: Path) -> None:
    lines = [f"{line.rpartition(',')[0]},{1767222039 + row}" for row, line in enumerate(rows(3))]
    log = write(tmp_path, lines)
    ingest(tmp_path, log)
    assert table_of(tmp_path)["time"] == [1767222039, 1767222040, 1767222041]
    other = tmp_path / "other"
    other.mkdir()
    ingest(other, log, formats=SourceFormats(log=FileFormat(time="seconds")))
    assert [time.timestamp() for time in table_of(other)["time"]] == [
        1767222039 + n for n in range(3)
    ]


def test_unsigned_ids_are_exact(tmp_path: Path) -> None:
    ids = [7, 2**63 + 11, 2**63 + 12, 2**64 - 1]
    n = 40
    log = {
        "x": np.arange(n) / n,
        "action": pa.array([ids[row % 4] for row in range(n)], pa.uint64()),
        "reward": [float(row % 2) for row in range(n)],
        "pscore": [0.25] * n,
    }
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    schema = LogSchema(context=(FeatureSpec(name="x", kind="numeric"),))
    ingest_files(IngestSource(tmp_path / "log.parquet", schema), tmp_path / "out")
    assert {int(item) for item in table_of(tmp_path, "catalogue")["item_id"]} == set(ids)
    assert [int(item) for item in table_of(tmp_path)["action"]] == [
        ids[row % 4] for row in range(n)
    ]


def test_a_bad_row_far_into_a_parquet_file_has_its_number_in_the_file(tmp_path: Path) -> None:
    pscore = np.full(1000, 0.5)
    pscore[777] = -1.0
    table = {"action": [1, 2] * 500, "reward": [0.0, 1.0] * 500, "pscore": pscore}
    pq.write_table(pa.table(table), tmp_path / "log.parquet", row_group_size=100)
    with pytest.raises(BadRowsError, match=r"row 777 of the file, row 777 of the log") as caught:
        ingest_files(IngestSource(tmp_path / "log.parquet", LogSchema()), tmp_path / "out")
    assert caught.value.rows[0].file_row == 777


def test_files_of_several_types_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    write(folder, rows(3))
    pq.write_table(pa.table({"a": [1]}), folder / "more.parquet")
    with pytest.raises(DataError, match=r"'log\.csv' is csv, 'more\.parquet' is parquet"):
        ingest(tmp_path, folder)


def test_a_plain_csv_keeps_the_numbers_of_pyarrow(tmp_path: Path) -> None:
    """Inferred types had the same numbers: float64 by the same parser."""
    rng = np.random.default_rng(0)
    lines = rows(200)
    ages = rng.normal(size=200).tolist()
    lines = [
        line.replace(f",{20 + row % 30},", f",{ages[row]!r},", 1) for row, line in enumerate(lines)
    ]
    log = write(tmp_path, lines)
    ingest(tmp_path, log)
    plain = pa_csv.read_csv(log)
    assert table_of(tmp_path)["age"] == plain["age"].to_pylist()
    assert table_of(tmp_path)["time"] == plain["time"].to_pylist()


@pytest.mark.parametrize("kind", ["csv.gz", "jsonl", "parquet"])
def test_workers_and_stores_write_the_same_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Files read twice and backwards by workers, and from a store whose reads fail."""
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 1024)
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", 1024)
    folder = tmp_path / "store" / "logs"
    folder.mkdir(parents=True)
    for number in range(3):
        lines = [f"u{number},{20 + row},01234,7,{row % 2},0.5,{row}" for row in range(200)]
        if kind == "parquet":
            text = dict(zip(HEADER.split(","), _columns(lines), strict=True))
            pq.write_table(pa.table(text), folder / f"{number}.parquet", row_group_size=50)
            continue
        if kind == "csv.gz":
            lines[50 + number] += ",more"
            content = "\n".join([HEADER, *lines]).encode()
            (folder / f"{number}.csv.gz").write_bytes(gzip.compress(content))
            continue
        lines[50 + number] = lines[50 + number].replace("01234", "[1]")
        content = as_json([HEADER, *lines])[1].replace(b'"[1]"', b"[1]")
        (folder / f"{number}.jsonl").write_bytes(content)
    plain, workers, store = (tmp_path / name for name in ("plain", "workers", "far"))
    for place in (plain, workers, store):
        place.mkdir()
    here = ingest(plain, folder, on_bad_rows="quarantine")
    spread = ingest(workers, folder, on_bad_rows="quarantine", execution=BACKWARDS)
    handler, root = unruly(monkeypatch, tmp_path / "store", "logs-in-a-store")
    handler.before = failing_reads(monkeypatch, 7, "When reading: Connection reset by peer")
    far = ingest(store, f"{root}/logs", on_bad_rows="quarantine")
    assert far.rows == spread.rows == here.rows == (600 if kind == "parquet" else 597)
    assert far.quarantined == here.quarantined == 600 - here.rows
    for place in (workers, store):
        for part in ("log", "catalogue"):
            assert content_of(place / "out" / part) == content_of(plain / "out" / part)
    if here.quarantined:
        rows_aside = [
            sorted(pq.read_table(place / "out" / "quarantine")["_row"].to_pylist())
            for place in (plain, workers, store)
        ]
        assert rows_aside == [[50, 251, 452]] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            gzip.compress(b"age,item\n1,2\n", mtime=0),
            "log.csv' is named as csv, but holds gzip data; rename",
        ),
        (b"PAR1\x15\x04", "holds Parquet; rename it to end in .parquet"),
        (b"\x28\xb5\x2f\xfd\x04", "holds zstd data; rename it to end in .csv.zst"),
        ("age,item\n1,2\n".encode("utf-16"), "holds UTF-16 text: set format.encoding: utf-16"),
    ],
    ids=["gzip", "parquet", "zstd", "utf-16"],
)
def test_a_name_that_belies_the_content_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        ingest(tmp_path, tmp_path / "log.csv")
