"""Pending outcomes at ingest: which rows stay, with which rewards, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offtower.data.check import BadRowsError
from offtower.data.ingest import IngestSource, IngestSummary, ingest_files
from offtower.data.ingest.notes import catalogue_notes
from offtower.data.log import ParquetLog
from offtower.data.outcomes import OutcomeCounts
from offtower.data.schema import CatalogueSchema, LogSchema, Outcomes
from offtower.errors import ConfigError, DataError
from tests.mappers import BACKWARDS

NOW = datetime(2026, 3, 10)
AGES = (20, 9, 8, 7, 6, 3, 0)
"""Days of each row; with a maturity of 7 d those of 6, 3 and 0 are young."""
REWARDS = (1.0, None, 0.0, 1.0, 1.0, None, None)
SCHEMA = LogSchema(
    action="item",
    reward="click",
    pscore="p",
    timestamp="at",
    outcomes=Outcomes(maturity="7d", missing=0.0),
)


def log(**columns: Any) -> pa.Table:
    content: dict[str, Any] = {
        "item": ["a", "b", "a", "b", "a", "b", "a"],
        "click": list(REWARDS),
        "p": [0.5] * 7,
        "at": [NOW - timedelta(days=age) for age in AGES],
    }
    return pa.table({**content, **columns})


def ingest(table: pa.Table, folder: Path, schema: LogSchema = SCHEMA, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "log.parquet", row_group_size=3)
    return ingest_files(IngestSource(folder / "log.parquet", schema), folder / "out", **options)


def rows_of(summary: IngestSummary) -> list[Any]:
    opened = ParquetLog.open(summary.log)
    assert opened.schema.outcomes is None
    return pa.concat_tables(opened.tables()).column("click").to_pylist()


def test_young_rows_are_left_out_whether_rewarded_or_not(tmp_path: Path) -> None:
    found = ingest(log(), tmp_path)
    assert rows_of(found) == [1.0, 0.0, 0.0, 1.0]
    assert found.outcomes == OutcomeCounts(young=3, young_rewarded=1, late=0, missing=1)
    assert found.rows == 4


def test_workers_write_the_same_log(tmp_path: Path) -> None:
    one = ingest(log(), tmp_path / "one")
    many = ingest(log(), tmp_path / "many", execution=BACKWARDS)
    assert (one.rows, one.outcomes) == (many.rows, many.outcomes)
    files = [(s.log.local / "part-00000.parquet").read_bytes() for s in (one, many)]
    assert files[0] == files[1]


def test_as_of_says_when_outcomes_were_collected(tmp_path: Path) -> None:
    outcomes = replace(SCHEMA.outcomes, as_of=NOW + timedelta(days=3))
    found = ingest(log(), tmp_path, replace(SCHEMA, outcomes=outcomes))
    assert rows_of(found) == [1.0, 0.0, 0.0, 1.0, 1.0]
    early = replace(SCHEMA, outcomes=replace(SCHEMA.outcomes, as_of=NOW - timedelta(days=30)))
    with pytest.raises(DataError, match=r"all 7 rows are younger than outcomes\.maturity"):
        ingest(log(), tmp_path / "early", early)
    assert not (tmp_path / "early" / "out" / "log").exists()


def test_outcomes_after_the_maturity_are_ignored(tmp_path: Path) -> None:
    came = [NOW - timedelta(days=age) for age in (12.9, 5, 5, 0, 5, 2, 0)]
    came[1] = None
    # Row 0: after 7.1 days; row 3: after exactly 7.
    schema = replace(SCHEMA, outcomes=replace(SCHEMA.outcomes, time="came"))
    found = ingest(log(came=pa.array(came)), tmp_path, schema)
    assert rows_of(found) == [0.0, 0.0, 0.0, 1.0]
    assert found.outcomes == OutcomeCounts(young=3, young_rewarded=1, late=1, missing=2)


def test_missing_error_refuses_a_mature_row_without_an_outcome(tmp_path: Path) -> None:
    strict = replace(SCHEMA, outcomes=replace(SCHEMA.outcomes, missing="error"))
    with pytest.raises(BadRowsError, match="row 1 of the log: column 'click' is null"):
        ingest(log(), tmp_path, strict)


def test_a_null_reward_is_never_zero(tmp_path: Path) -> None:
    with pytest.raises(BadRowsError, match="add the section 'outcomes' to the schema"):
        ingest(log(), tmp_path, replace(SCHEMA, outcomes=None))


def test_numbers_as_times_need_a_maturity_in_their_unit(tmp_path: Path) -> None:
    seconds = [int((NOW - timedelta(days=age)).replace(tzinfo=UTC).timestamp()) for age in AGES]
    with pytest.raises(DataError, match="whose unit is unknown"):
        ingest(log(at=seconds), tmp_path / "text")
    schema = replace(SCHEMA, outcomes=replace(SCHEMA.outcomes, maturity=7 * 86400))
    found = ingest(log(at=seconds), tmp_path / "number", schema)
    assert rows_of(found) == [1.0, 0.0, 0.0, 1.0]


def test_a_log_without_rewards_is_refused(tmp_path: Path) -> None:
    served = log(pscore_error=[0.0] * 7).drop_columns(["click"])
    with pytest.raises(DataError, match="served decisions, and no outcome was joined"):
        ingest(served, tmp_path)


def test_the_schema_of_outcomes_is_checked() -> None:
    read = LogSchema.from_dict(SCHEMA.to_dict())
    assert read == SCHEMA
    for content, message in (
        ({"maturity": "7 days"}, "number with a unit"),
        ({"maturity": -1}, "must not be negative"),
        ({"maturity": "7d", "missing": "zero"}, "missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            LogSchema.from_dict({"timestamp": "at", "outcomes": content})
    with pytest.raises(ConfigError, match="outcomes need a timestamp"):
        LogSchema.from_dict({"outcomes": {"maturity": "7d"}})


def test_pending_rows_are_not_read_as_a_log(tmp_path: Path) -> None:
    pq.write_table(log(), tmp_path / "log.parquet")
    with pytest.raises(DataError, match="Ingest the log"):
        ParquetLog.open(tmp_path / "log.parquet", SCHEMA)


REVENUE = replace(SCHEMA, timestamp=None, outcomes=None)


def revenue_log() -> pa.Table:
    """Of 200 rows ten are purchases of 45: the mean reward is 2.25."""
    click = np.zeros(200)
    click[::20] = 45.0
    return pa.table({"item": ["a", "b"] * 100, "click": click, "p": [0.5] * 200})


def test_a_quarantine_that_moves_the_mean_reward_needs_confirmation(tmp_path: Path) -> None:
    with pytest.raises(BadRowsError, match=r"reward_range: \[0, 45\]"):
        ingest(revenue_log(), tmp_path / "a", REVENUE)
    with pytest.raises(DataError, match=r"from 2.25 \(all 200 .* to 0 \(190 good rows\)"):
        ingest(revenue_log(), tmp_path / "b", REVENUE, on_bad_rows="quarantine")
    assert not (tmp_path / "b" / "out" / "log").exists()
    found = ingest(
        revenue_log(), tmp_path / "b", REVENUE, on_bad_rows="quarantine", moved_mean="accept"
    )
    assert found.rows == 190 and "from 2.25" in found.notes[-1]
    mended = ingest(revenue_log(), tmp_path / "c", replace(REVENUE, reward_range=(0.0, 100.0)))
    assert mended.rows == 200


def test_a_quarantine_of_random_rows_needs_none(tmp_path: Path) -> None:
    """Bad propensities of 5 of 400 rows, of both rewards in their shares."""
    table = pa.table(
        {
            "item": ["a", "b"] * 200,
            "click": [0.0, 1.0] * 200,
            "p": [0.5 if i % 80 else 7.0 for i in range(0, 1200, 3)],
        }
    )
    found = ingest(table, tmp_path, REVENUE, on_bad_rows="quarantine")
    assert found.quarantined == 5 and found.rows == 395


def test_a_catalogue_without_features_is_noted(tmp_path: Path) -> None:
    found = ingest(log(), tmp_path)
    assert "no features besides the ids" in found.notes[0]
    # A catalogue with a file and no feature at all, not even the ids, cannot be trained on.
    items = CatalogueSchema()
    assert "no policy can be trained" in catalogue_notes(items)[0]
