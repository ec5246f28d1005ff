"""Histories in logs: their encoding, and what is wrong with them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offtower.data import Catalogue, ParquetLog, TableLog
from offtower.data.encoding import FeatureEncoding
from offtower.data.features import BagArray, concat, take
from offtower.data.histories import AGE, DWELL, EVENT, HistoryBasis
from offtower.data.ingest import HistoryOptions, IngestSource, Split, ingest_files
from offtower.data.rules import find_faults
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.validate import validate_log
from offtower.errors import ConfigError, DataError

SPEC = FeatureSpec(name="h", kind="history", length=3, times="t", events="e", dwell="d")
SCHEMA = LogSchema(context=(SPEC,), timestamp="at", pscore=None)
CATALOGUE = Catalogue.from_table(
    pa.table({"item_id": ["b", "a", "c"]}),
    CatalogueSchema(features=(FeatureSpec(name="item_id", kind="category"),)),
)


def table(**changes: Any) -> pa.Table:
    columns = {
        "action": ["a", "a", "b", "c"],
        "reward": [0.0, 1.0, 0.0, 1.0],
        "at": [10, 10, 10, 9],
        "h": [["b", "a"], None, [], ["c", "zz", "a", "b"]],
        "t": [[5, 3], None, [], [1, 2, 3, 4]],
        "e": [["x", "y"], None, [], ["x", "x", None, "y"]],
        "d": [[1.0, 2.0], None, [], [4.0, 2.0, 3.0, 4.0]],
    }
    return pa.table({**columns, **changes})


def fitted(rows: pa.Table | None = None) -> FeatureEncoding:
    basis = HistoryBasis(CATALOGUE.item_ids, "at")
    return FeatureEncoding.fit(SCHEMA.context, [table() if rows is None else rows], basis)


def test_the_newest_events_are_encoded_in_the_order_of_their_times() -> None:
    encoding = fitted()
    found = encoding.encode(table())["h"]
    assert isinstance(found, BagArray)
    # Row 0 is sorted by time; of row 3 the oldest is left out. Ids: a 1, b 2, c 3; unknown 0.
    np.testing.assert_array_equal(found.values, [1, 2, 0, 1, 2])
    np.testing.assert_array_equal(found.offsets, [0, 2, 2, 2, 5])
    np.testing.assert_array_equal(found.columns[AGE], [7, 5, 7, 6, 5])
    np.testing.assert_array_equal(found.columns[EVENT], [2, 1, 1, 0, 2])
    # Moments are those of the five events that are read.
    numbers = np.array([2.0, 1.0, 2.0, 3.0, 4.0])
    standard = (numbers - numbers.mean()) / numbers.std()
    np.testing.assert_allclose(found.columns[DWELL], standard, rtol=1e-6)
    # The item tower's ids have the same codes, and a stored encoding is the same.
    of_items = FeatureEncoding.fit(CATALOGUE.schema.features, [CATALOGUE.table(0, 3)])
    assert encoding.same_values("h", of_items, "item_id")
    again = FeatureEncoding.from_dict(encoding.to_dict()).encode(table())["h"]
    assert isinstance(again, BagArray)
    np.testing.assert_array_equal(again.columns[AGE], found.columns[AGE])
    assert encoding.columns == ("h", "t", "e", "d", "at")
    # Rows that are selected and joined keep what is known of their events.
    arrays = encoding.encode(table())
    joined = concat([take(arrays, np.array([3])), take(arrays, np.array([1, 0]))])["h"]
    assert isinstance(joined, BagArray)
    np.testing.assert_array_equal(joined.values, [0, 1, 2, 1, 2])
    np.testing.assert_array_equal(joined.columns[EVENT], [1, 0, 2, 2, 1])


def test_times_of_timestamps_are_seconds_and_may_be_text() -> None:
    at = datetime(2026, 5, 1, 12)
    clock = [[datetime(2026, 5, 1, 11, 59), datetime(2026, 5, 1, 11)], None, [], []]
    h, e, d = [["a", "b"], None, [], []], [["x", "x"], None, [], []], [[1.0, 1.0], None, [], []]
    given = table(at=pa.array([at] * 4), t=pa.array(clock), h=h, e=e, d=d)
    text = [[str(time) for time in row or ()] for row in clock]
    for rows in (given, given.set_column(given.column_names.index("t"), "t", pa.array(text))):
        found = fitted(rows).encode(rows)["h"]
        assert isinstance(found, BagArray)
        np.testing.assert_array_equal(found.columns[AGE], [3600.0, 60.0])
        np.testing.assert_array_equal(found.values, [2, 1])
    with pytest.raises(DataError, match="'t' holds numbers and 'at' holds times; write both alike"):
        fitted(table(at=pa.array([at] * 4)))


@pytest.mark.parametrize(
    ("changes", "column", "problem", "rows"),
    [
        ({"at": [5, 10, 10, 5]}, "t", "not before the row", [0]),
        ({"at": [11, 10, 10, 2]}, "t", "not before the row", [3]),
        ({"t": [[5, None], None, [], [1, 2, 3, 4]]}, "t", "with a null", [0]),
        ({"t": [[5], None, [], [1, 2, 3]]}, "t", "of another length", [0, 3]),
        ({"e": [["x", "y"], ["x"], [], [None] * 4]}, "e", "of another length", [1]),
        ({"d": [[1.0, float("nan")], None, [], [0.0] * 4]}, "d", "not finite", [0]),
    ],
)
def test_bad_histories_are_named(
    changes: dict[str, Any], column: str, problem: str, rows: list[int]
) -> None:
    assert not find_faults(table(), SCHEMA, CATALOGUE, "log")
    (fault,) = find_faults(table(**changes), SCHEMA, CATALOGUE, "log")
    assert (fault.column, fault.problem) == (column, problem)
    assert np.flatnonzero(fault.mask).tolist() == rows
    report = validate_log(TableLog(table(**changes), SCHEMA), CATALOGUE)
    assert not report.ok


def test_validation_says_what_is_done_with_odd_histories() -> None:
    found = {one.name: one for one in validate_log(TableLog(table(), SCHEMA), CATALOGUE).findings}
    text = found["histories"].message
    assert found["histories"].level == "info"
    for part in (
        "2 of 4 rows have an empty history",
        "1 has more than 3 events, of which the newest 3 are read",
        "1 is not in the order of its times, and is sorted",
        "1 of 6 events names an item that the catalogue does not have",
    ):
        assert part in text
    # The newest event of nearly every row is the item that it shows: no policy will know that.
    own = pa.table(
        {
            "action": ["a", "b", "c"] * 40,
            "reward": [0.0] * 120,
            "h": [["b", "a"], ["a", "b"], ["b", "c"]] * 40,
        }
    )
    schema = LogSchema(context=(FeatureSpec(name="h", kind="history"),), pscore=None)
    leak = validate_log(TableLog(own, schema), CATALOGUE).findings
    (warning,) = [one for one in leak if one.name == "history contains the row"]
    assert warning.level == "warning" and "120 of 120 rows" in warning.message


def test_schemas_of_histories_are_checked() -> None:
    for content, message in (
        ({"name": "h", "kind": "bag", "length": 3}, "'length' is for histories, not for bag"),
        ({"name": "h", "kind": "history", "encoding": "hash"}, "are the items of the catalogue"),
        ({"name": "h", "kind": "history", "times": "h"}, "names one column twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            LogSchema.from_dict({"context": [content]})
    with pytest.raises(ConfigError, match="name 'timestamp'"):
        LogSchema.from_dict({"context": [{"name": "h", "kind": "history", "times": "t"}]})
    with pytest.raises(ConfigError, match="histories are features of contexts"):
        CatalogueSchema.from_dict({"features": [{"name": "h", "kind": "history"}]})
    assert "length" not in repr(FeatureSpec(name="x", kind="numeric"))
    other = pa.table({"action": ["a"], "reward": [0.0], "h": [[1, 2]]})
    schema = LogSchema(context=(FeatureSpec(name="h", kind="history"),), pscore=None)
    with pytest.raises(DataError, match="expected lists of text, as the item ids of the catalogue"):
        find_faults(other, schema, CATALOGUE, "log")


@pytest.mark.parametrize("rewarded", [False, True])
def test_ingest_builds_histories_from_a_plain_log(tmp_path: Path, rewarded: bool) -> None:
    """Against a loop over the rows; events at the row's own time are no history."""
    rng = np.random.default_rng(3)
    n = 400
    columns = {
        "action": [f"i{k}" for k in rng.integers(0, 9, n)],
        "reward": rng.integers(0, 2, n).astype(float),
        "time": rng.integers(0, 60, n) + 1_000_000_000,
        "who": [f"u{k}" for k in rng.integers(0, 12, n)],
    }
    pq.write_table(pa.table(columns), tmp_path / "events.parquet")
    schema = LogSchema(timestamp="time", user_id="who", pscore=None)
    options = HistoryOptions.parse("user,4,rewarded" if rewarded else "user,4")
    source = IngestSource(tmp_path / "events.parquet", schema, history=options)
    summary = ingest_files(source, tmp_path / "out", split=Split("time"))
    assert summary.report is not None and summary.report.ok
    log = ParquetLog.open(tmp_path / "out" / "log")
    spec = FeatureSpec(
        name="history", kind="history", length=4, times="history_times", dwell="history_rewards"
    )
    assert log.schema.context == (spec,)
    assert not list((tmp_path / "out").glob(".history-*"))
    found = pa.concat_tables(log.tables()).to_pylist()
    assert [row["action"] for row in found] == columns["action"]
    events = list(
        zip(columns["who"], columns["time"], columns["action"], columns["reward"], strict=True)
    )
    for row, (user, time, _, _) in zip(found, events, strict=True):
        before = sorted(
            (
                (at, number, item, reward)
                for number, (one, at, item, reward) in enumerate(events)
                if one == user and at < time and (reward > 0 or not rewarded)
            )
        )[-4:]
        assert row["history"] == [item for _, _, item, _ in before]
        assert row["history_times"] == [at for at, _, _, _ in before]
        assert row["history_rewards"] == [reward for _, _, _, reward in before]
    assert log.num_rows == sum(
        ParquetLog.open(tmp_path / "out" / p).num_rows for p in ("train", "validation", "test")
    )


def test_histories_of_a_plain_log_need_users_and_times(tmp_path: Path) -> None:
    for text in ("user", "user,0", "user,x", ",5", "user,5,all"):
        with pytest.raises(ConfigError, match="must be a column and the most events"):
            HistoryOptions.parse(text)
    options = HistoryOptions("user", 5)
    for schema, message in (
        (LogSchema(timestamp="at"), "the log schema names no user_id"),
        (LogSchema(user_id="who"), "name 'timestamp' in the log schema"),
        (LogSchema(user_id="history", timestamp="at"), "writes the column 'history'"),
    ):
        with pytest.raises(ConfigError, match=message):
            options.column(schema)
    with pytest.raises(ConfigError, match="the log schema names no column 'session'"):
        HistoryOptions("session", 5).column(LogSchema(timestamp="at"))
