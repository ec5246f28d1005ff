from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from offtower.data import Finding, TableLog, ValidationReport, validate_log
from offtower.data.findings.sketches import DuplicateCount, ItemSet
from offtower.data.moments import Moments
from offtower.mapping import merge_all
from tests.data.conftest import make_catalogue, make_schema, make_table
from tests.mappers import BACKWARDS


def report_of(n: int = 2000, **columns: pa.Array) -> ValidationReport:
    table = make_table(n)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    log = TableLog(table, make_schema(), rows_per_group=300)
    return validate_log(log, make_catalogue())


def named(report: ValidationReport, name: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.name == name]


def test_a_good_log_is_ok() -> None:
    report = report_of()
    assert report.ok and json.loads(json.dumps(report.to_dict(), allow_nan=False))["ok"]
    for finding in named(report, "inverse pscore"):
        assert finding.numbers["mean"] == 4 and "consistent" in finding.message
    (reward,) = named(report, "reward")
    assert reward.numbers["low"] < 0.5 < reward.numbers["high"]
    assert "standard error of independent rows" in reward.message  # it has users and rounds
    assert named(report, "behavior policies")[0].level == "info"
    assert not named(report, "repeats") and not named(report, "constant")


def test_wrong_propensities_are_seen() -> None:
    small = report_of(pscore=np.full(2000, 0.1))
    assert not small.ok and "too small" in named(small, "inverse pscore")[0].message
    large = report_of(pscore=np.full(2000, 0.9))
    assert named(large, "inverse pscore")[0].level == "warning"
    mixed = report_of(pscore=np.where(np.arange(2000) % 2, 0.25, 0.5))
    assert named(mixed, "behavior policies")[0].level == "warning"


def test_one_heavy_row_is_too_noisy_to_say_anything() -> None:
    pscore = np.full(2000, 0.25)
    pscore[7] = 1e-7
    noisy = [f for f in named(report_of(pscore=pscore), "inverse pscore") if "noisy" in f.message]
    assert len(noisy) == 1 and noisy[0].level == "info"


def test_constant_columns_repeats_coverage_and_bad_rows() -> None:
    reward = np.zeros(2000)
    reward[[5, 900]] = np.nan
    report = report_of(
        age=np.ones(2000), round=np.arange(2000) // 2, action=["hat"] * 2000, reward=reward
    )
    assert "'age'" in named(report, "constant")[0].message
    assert named(report, "repeats")[0].numbers["rows"] == 1000 - 2
    assert "1 of 4 items" in named(report, "coverage")[0].message
    assert named(report, "rows")[0].numbers["bad"] == 2
    assert [("row 5 " in f.message, "row 900 " in f.message) for f in named(report, "row")] == [
        (True, False),
        (False, True),
    ]


def test_only_bad_rows() -> None:
    report = report_of(20, pscore=np.zeros(20))
    assert not report.ok and "no row is good" in named(report, "reward")[0].message
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_target_mass_without_support() -> None:
    log = TableLog(make_table(2000), make_schema())
    # Half of the target's mass lies on items that the log never shows.
    report = validate_log(log, make_catalogue(), lambda table: np.full(table.num_rows, 0.125))
    (finding,) = named(report, "target")
    assert finding.level == "warning" and finding.numbers["without_support"] == 0.5


def test_repeats_in_bounded_memory() -> None:
    keys = np.arange(100_000, dtype=np.uint64)
    rows = np.concatenate([keys, keys[:30_000]])
    parts = np.array_split(rows, 50)
    exact = merge_all(DuplicateCount.of(part) for part in parts)
    bounded = merge_all(DuplicateCount.of(part, limit=4000) for part in parts)
    assert exact.count() == 30_000 and exact.shift == 0
    # About 2,000 or more kept repeats: a standard error under 5 %, so 20 % fails by chance never.
    assert abs(bounded.count() - 30_000) < 6_000 and bounded.shift > 0
    # What is kept depends on the set of keys, not on how it was cut or in which order it came.
    other = DuplicateCount.of(rows[::-1], limit=4000)
    for cut in np.array_split(np.random.default_rng(0).permutation(rows), 7)[::-1]:
        other = other.merge(DuplicateCount.of(cut, limit=4000))
    assert other.shift == bounded.shift
    assert np.array_equal(other.key, bounded.key)


@given(st.lists(st.lists(st.integers(0, 299), max_size=40), min_size=1, max_size=8))
def test_item_sets_are_sets(parts: list[list[int]]) -> None:
    """Few items are numbers, many are bits; 300 items turn from one to the other at five."""
    found = merge_all(ItemSet.of(np.asarray(part, dtype=np.int64), 300) for part in parts)
    assert len(found) == len(set().union(*parts))


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=20), min_size=1, max_size=8))
def test_moments_merge(parts: list[list[float]]) -> None:
    found = merge_all(Moments.of(np.asarray(part, dtype=np.float64)) for part in parts)
    whole = np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])
    assert found.count == whole.size
    if whole.size:
        scale = float(np.abs(whole).max())
        assert abs(found.mean - whole.mean()) <= 1e-13 * scale
        assert abs(found.square - np.square(whole - whole.mean()).sum()) <= 1e-12 * scale**2 * 200
        assert (found.smallest, found.largest) == (whole.min(), whole.max())


def test_the_report_does_not_depend_on_who_ran_the_parts() -> None:
    reward = np.random.default_rng(1).random(5000)
    reward[[17, 4000]] = np.nan
    table = make_table(5000)
    table = table.set_column(table.schema.get_field_index("reward"), "reward", pa.array(reward))
    log = TableLog(table, make_schema(), rows_per_group=37)
    one = validate_log(log, make_catalogue())
    assert validate_log(log, make_catalogue(), execution=BACKWARDS) == one
    assert "bad values" in named(one, "rows")[0].message
