"""Values of cells: what they become, and which are bad."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offtower.data.formats.kinds import ColumnKind, joined_kinds
from offtower.data.formats.options import FileFormat, SourceFormats
from offtower.data.source import open_source, read_source
from offtower.errors import ConfigError, DataError


def cells(folder: Any, kind: ColumnKind, written: list[str], **options: Any) -> list[Any]:
    """Values of a column in a CSV file; "bad" for a bad cell."""
    file = folder / "file.csv"
    file.write_text("\n".join(["value;other", *(f"{cell};x" for cell in written)]) + "\n")
    source = open_source(file, {"value": kind}, FileFormat(delimiter=";", **options))
    found: list[Any] = []
    for batch, origin in source.located(0):
        values = batch.column(0).to_pylist()
        for one in origin.bad_cells_of(batch.num_rows):
            for row in one.rows:
                assert values[row] is None
                values[row] = "bad"
        found += values
    return found


NUMBERS: list[tuple[dict[str, Any], list[str], list[Any]]] = [
    ({}, ["1", " 2.5 ", "+3", "1e3", "-.5", "", "true"], [1, 2.5, 3, 1000, -0.5, None, 1]),
    ({}, ["12,50", "1.234.567", "abc", "1_0", "0x10", "5"], ["bad"] * 5 + [5]),
    ({"decimal": ","}, ["12,50", "12.50", "-,5", "1,2,3", "7"], [12.5, "bad", -0.5, "bad", 7]),
    (
        {"decimal": ",", "thousands": "."},
        ["1.234,5", "1234,5", "0.5", "12.34", "1.234.567", "1.2345"],
        [1234.5, 1234.5, "bad", "bad", 1234567, "bad"],
    ),
    ({"thousands": "'"}, ["1'234.5", "12'34"], [1234.5, "bad"]),
    ({"null_words": ["-", "NA"]}, ["-", "NA", "1", ""], [None, None, 1, None]),
]


@pytest.mark.parametrize(("options", "written", "wanted"), NUMBERS)
def test_numbers_are_read_cell_by_cell(
    tmp_path: Any, options: dict[str, Any], written: list[str], wanted: list[Any]
) -> None:
    assert cells(tmp_path, "number", written, **options) == wanted


def test_whole_numbers(tmp_path: Any) -> None:
    written = ["5", "5.0", "5.5", "9223372036854775807", "9223372036854775808", "-3", "x", "1e2"]
    wanted = [5, 5, "bad", 2**63 - 1, "bad", -3, "bad", 100]
    assert cells(tmp_path, "integer", written) == wanted


def test_text_stays_as_it_stands(tmp_path: Any) -> None:
    written = ["007", "7", " 7", "NA", "null", "nan", "true", "1e3", "", '""', "01234"]
    wanted = ["007", "7", " 7", "NA", "null", "nan", "true", "1e3", None, "", "01234"]
    assert cells(tmp_path, "text", written) == wanted
    assert cells(tmp_path, "text", [" 7 ", "- "], trim=True, null_words=["-"]) == ["7", None]


TIMES: list[tuple[dict[str, Any], list[str], list[Any]]] = [
    ({}, ["2026-01-31T10:00:00+01:00", "2026-01-31 09:00:00Z"], [datetime(2026, 1, 31, 9)] * 2),
    (
        {},
        ["2026-01-31T10:00:00", "2026-01-31", "x"],
        [datetime(2026, 1, 31, 10), datetime(2026, 1, 31), "bad"],
    ),
    ({}, ["2026-01-31T10:00:00", "2026-01-31T10:00:00Z"], [datetime(2026, 1, 31, 10), "bad"]),
    ({}, ["2026-01-31T10:00:00.123456789"], [datetime(2026, 1, 31, 10, 0, 0, 123456)]),
    ({}, ["10", "11", "12.5"], [10, 11, "bad"]),
    ({}, ["10.5", "11"], [10.5, 11.0]),
    (
        {"time": "%d.%m.%Y %H:%M"},
        ["31.01.2026 10:00", "1.2.2026 0:05", "31.02.2026 10:00", "31.01.2026"],
        [datetime(2026, 1, 31, 10), datetime(2026, 2, 1, 0, 5), "bad", "bad"],
    ),
    (
        {"time": "%d.%m.%Y %H:%M", "zone": "Europe/Berlin"},
        # The clocks skip 02:30 in March, and show it twice in October: the earlier one is meant.
        ["31.01.2026 10:00", "29.03.2026 02:30", "25.10.2026 02:30", "01.07.2050 12:00"],
        [datetime(2026, 1, 31, 9), "bad", datetime(2026, 10, 25, 0, 30), datetime(2050, 7, 1, 10)],
    ),
    (
        {"zone": "Europe/Berlin"},
        ["2026-01-31T10:00:00", "2026-01-31T10:00:00Z"],
        [datetime(2026, 1, 31, 9), datetime(2026, 1, 31, 10)],
    ),
    ({"time": "%d/%m/%y %H:%M %z"}, ["31/01/26 10:00 +0100"], [datetime(2026, 1, 31, 9)]),
    (
        {"time": "seconds"},
        ["1.5", "2", "x"],
        [datetime(1970, 1, 1, 0, 0, 1, 500000), datetime(1970, 1, 1, 0, 0, 2), "bad"],
    ),
    ({"time": "nanoseconds"}, ["1767222039000000000"], [datetime(2025, 12, 31, 23, 0, 39)]),
]


@pytest.mark.parametrize(("options", "written", "wanted"), TIMES)
def test_times(
    tmp_path: Any, options: dict[str, Any], written: list[str], wanted: list[Any]
) -> None:
    found = cells(tmp_path, "time", written, **options)
    zoned = options.get("zone") or options.get("time", "").endswith(("seconds", "%z"))
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, datetime):
            assert (one.tzinfo is not None) == bool(
                zoned or (written[0].endswith(("00", "Z")) and "+" in written[0])
            )
            one = one.astimezone(UTC).replace(tzinfo=None) if one.tzinfo else one
        assert one == other


def test_a_first_time_of_an_unknown_form_names_the_key(tmp_path: Any) -> None:
    with pytest.raises(DataError, match=r"'value' is '31\.01\.2026'.*format\.time"):
        cells(tmp_path, "time", ["31.01.2026"])


def test_vectors_and_bags(tmp_path: Any) -> None:
    written = ["[1, 2.5]", "[ -1e3,0 ]", "[]", '["x"]', "[1", "", "[1, null]", "7"]
    wanted = [[1.0, 2.5], [-1000.0, 0.0], [], "bad", "bad", None, [1.0, None], "bad"]
    assert cells(tmp_path, "vector", written) == wanted
    spaced = cells(tmp_path, "vector", ["1,5 2", "3 x", ""], list_separator=" ", decimal=",")
    assert spaced == [[1.5, 2.0], "bad", None]
    bags = ["[1, 2.0]", '[""a"", null]', "[1.5]", "{}", "[[1]]"]
    written = [f'"{cell}"' for cell in bags]
    assert cells(tmp_path, "bag", written) == [["1", "2"], ["a", None], "bad", "bad", "bad"]
    assert cells(tmp_path, "bag", ["a|b", "c", '""'], list_separator="|") == [["a", "b"], ["c"], []]


def test_bytes_that_are_not_utf8_are_a_bad_cell(tmp_path: Any) -> None:
    file = tmp_path / "file.csv"
    file.write_bytes("item,n\nä,1\n".encode() + "ö,2\n".encode("latin-1"))
    source = open_source(file, {"item": "text", "n": "number"})
    ((batch, origin),) = source.located(0)
    assert batch.to_pydict() == {"item": ["ä", None], "n": [1.0, 2.0]}
    (bad,) = origin.bad_cells_of(2)
    assert bad.rows.tolist() == [1] and "format.encoding" in bad.describe()
    text = FileFormat(encoding="latin-1")
    file.write_bytes("item,n\nä,1\nö,2\n".encode("latin-1"))
    assert read_source(file, {"item": "text"}, text).to_pydict() == {"item": ["ä", "ö"]}


def arrow_columns() -> list[tuple[ColumnKind, pa.Array, list[Any]]]:
    texts = pa.array(["a", "b"])
    day = datetime(2026, 1, 31, 9)
    berlin = pa.timestamp("ns", "Europe/Berlin")
    return [
        ("text", texts.dictionary_encode(), ["a", "b"]),
        ("text", texts.cast(pa.large_string()), ["a", "b"]),
        ("text", texts.cast(pa.string_view()), ["a", "b"]),
        ("text", texts.cast(pa.binary()), ["a", "b"]),
        ("text", pa.array([1, 2]).dictionary_encode(), [1, 2]),
        ("text", pa.array([1.0, 2.5, float("nan"), None]), [1, "bad", None, None]),
        ("text", pa.array([Decimal("5"), Decimal("6")], pa.decimal128(9, 0)), [5, 6]),
        ("text", pa.array([Decimal(2**64), None], pa.decimal128(38, 0)), [str(2**64), None]),
        ("text", pa.array([7, 2**63 - 1], pa.uint64()), [7, 2**63 - 1]),
        (
            "text",
            pa.array([7, 2**63 + 11, 2**64 - 1], pa.uint64()),
            ["7", str(2**63 + 11), str(2**64 - 1)],
        ),
        ("number", pa.array([Decimal("0.10"), None], pa.decimal256(5, 2)), [Decimal("0.10"), None]),
        ("number", pa.array(["1.5", "x"]), [1.5, "bad"]),
        ("number", pa.array([True, False]), [True, False]),
        ("integer", pa.array([1.0, 2.5]), [1, "bad"]),
        ("integer", pa.array([1, 2**63], pa.uint64()), [1, "bad"]),
        ("time", pa.array([day], pa.timestamp("s")), [day]),
        ("time", pa.array([day], berlin), [day.replace(tzinfo=UTC)]),
        ("time", pa.array([date(2026, 1, 31)]), [datetime(2026, 1, 31)]),
        ("time", pa.array(["2026-01-31T10:00:00+01:00"]), [day.replace(tzinfo=UTC)]),
        ("time", pa.array([5, 2**63], pa.uint64()), [5, "bad"]),
        ("time", pa.array([Decimal("1.5")], pa.decimal128(9, 1)), [1.5]),
        ("vector", pa.array(["[1, 2]", "[3"]), [[1.0, 2.0], "bad"]),
        ("vector", pa.array([[1, 2]], pa.list_(pa.int8(), 2)), [[1, 2]]),
        ("vector", pa.array([[1.0, 2.0]], pa.list_view(pa.float32())), [[1.0, 2.0]]),
        ("bag", pa.array([["a"], None], pa.list_(pa.string_view())), [["a"], None]),
        ("bag", pa.array([[1.0, 2.0], [1.5]]), [[1, 2], "bad"]),
        ("bag", pa.array(['["a", 5]']), [["a", "5"]]),
    ]


@pytest.mark.parametrize(("kind", "column", "wanted"), arrow_columns())
def test_arrow_columns_of_every_writer(
    tmp_path: Any, kind: ColumnKind, column: pa.Array, wanted: list[Any]
) -> None:
    table = pa.table({"value": column})
    files = []
    # Arrow files have no statistics, by which small unsigned integers stay integers.
    if not (pa.types.is_uint64(column.type) and wanted[0] == 7):
        files.append(tmp_path / "file.arrow")
        with pa.ipc.new_file(files[0], table.schema) as writer:
            writer.write_table(table)
    if not pa.types.is_decimal256(column.type) and not pa.types.is_list_view(column.type):
        files.append(tmp_path / "file.parquet")
        pq.write_table(table, files[-1])
    for one in files:
        source = open_source(one, {"value": kind})
        ((batch, origin),) = source.located(0)
        values = batch.column(0).to_pylist()
        for bad in origin.bad_cells_of(batch.num_rows):
            for row in bad.rows:
                values[row] = "bad"
        assert values == wanted, one


def test_int96_holds_every_year(tmp_path: Any) -> None:
    times = [datetime(9999, 1, 1), datetime(2024, 1, 1)]
    table = pa.table({"t": pa.array(times, pa.timestamp("us"))})
    pq.write_table(table, tmp_path / "t.parquet", use_deprecated_int96_timestamps=True)
    assert read_source(tmp_path / "t.parquet", {"t": "time"}).to_pydict() == {"t": times}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"t": pa.array([0], pa.timestamp("us"))},
            {"t": pa.array([0], pa.timestamp("us", "UTC"))},
            "'t' is a time without a zone in 'a.parquet' and a time in zone UTC in 'b.parquet'",
        ),
        (
            {"t": pa.array([0])},
            {"t": pa.array([0.5])},
            "'t' is int64 in 'a.parquet' and double in 'b.parquet'",
        ),
        (
            {"t": pa.array([0]), "i": pa.array(["x"])},
            {"t": pa.array([0]), "i": pa.array([1])},
            "'i' is string in 'a.parquet' and int64 in 'b.parquet'",
        ),
        (
            {"t": pa.array([0]), "i": pa.array(["x"])},
            {"t": pa.array([0])},
            "b.parquet' has no column 'i'",
        ),
    ],
)
def test_files_of_a_folder_that_differ_are_refused(
    tmp_path: Any, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(first), tmp_path / "a.parquet")
    pq.write_table(pa.table(second), tmp_path / "b.parquet")
    kinds: dict[str, ColumnKind] = {"t": "time", **({"i": "text"} if "i" in first else {})}
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, kinds)


def test_numbers_of_a_folder_may_differ_in_type(tmp_path: Any) -> None:
    for name, values in (("a", [1, 2]), ("b", [0.5])):
        pq.write_table(pa.table({"n": values}), tmp_path / f"{name}.parquet")
    assert read_source(tmp_path, {"n": "number"}).to_pydict() == {"n": [1.0, 2.0, 0.5]}


def test_text_files_of_a_folder_with_and_without_zones_are_refused(tmp_path: Any) -> None:
    (tmp_path / "a.csv").write_text("t\n2026-01-31T10:00:00\n")
    (tmp_path / "b.csv").write_text("t\n2026-01-31T10:00:00Z\n")
    with pytest.raises(DataError, match=r"without a zone in 'a\.csv' and .* zone UTC in 'b\.csv'"):
        open_source(tmp_path, {"t": "time"})
    both = FileFormat(zone="UTC")
    assert read_source(tmp_path, {"t": "time"}, both).num_rows == 2


def test_columns_of_hive_folders_are_text(tmp_path: Any) -> None:
    wanted = {"n": [], "zip": []}
    for number, value in enumerate(["01234", "NA", "a b", "__HIVE_DEFAULT_PARTITION__"]):
        folder = tmp_path / f"zip={value.replace(' ', '%20')}"
        folder.mkdir()
        pq.write_table(pa.table({"n": [number]}), folder / "part.parquet")
    found = read_source(tmp_path, {"zip": "text", "n": "number"}).to_pylist()
    wanted = {0: "01234", 1: "NA", 2: "a b", 3: None}
    assert {row["n"]: row["zip"] for row in found} == wanted


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"delimeter": ";"}, "did you mean 'delimiter'"),
        ({"delimiter": ";;"}, "one ASCII character"),
        ({"encoding": "klingon"}, "unknown encoding"),
        ({"zone": "Mars/Base"}, "unknown time zone"),
        ({"time": "hours"}, "seconds, milliseconds"),
        ({"decimal": ",", "thousands": ","}, "are both"),
        ({"log": 3}, "format.log must be keys"),
    ],
)
def test_formats_are_validated(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SourceFormats.from_dict(section)


def test_sections_override_the_shared_format() -> None:
    formats = SourceFormats.from_dict({"decimal": ",", "log": {"decimal": "."}})
    assert (formats.log.decimal, formats.catalogue.decimal) == (".", ",")


def test_columns_with_two_uses() -> None:
    assert joined_kinds([("a", "text"), ("a", "number")]) == {"a": "integer"}
    with pytest.raises(ConfigError, match="'a' both as text and as vector"):
        joined_kinds([("a", "text"), ("a", "vector")])


def test_a_vector_of_large_numbers_is_centered_in_float64() -> None:
    from offtower.data import FeatureEncoding, FeatureSpec

    values = 1.7e9 + 10.0 * np.arange(8)
    table = pa.table({"v": pa.array([[value, -value] for value in values])})
    encoding = FeatureEncoding.fit([FeatureSpec(name="v", kind="vector")], [table])
    steps = np.arange(8) - 3.5
    wanted = steps / np.sqrt(np.mean(steps**2))
    found = encoding.encode(table)["v"]
    np.testing.assert_allclose(found, np.stack([wanted, -wanted], axis=1), rtol=1e-6)
