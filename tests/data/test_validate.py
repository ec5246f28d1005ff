from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

from offtower.data import Finding, TableLog, ValidationReport, validate_log
from offtower.data.validate import _Repeats
from tests.data.conftest import make_catalogue, make_schema, make_table


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
    exact, bounded = _Repeats(), _Repeats(limit=4000)
    for part in np.array_split(np.concatenate([keys, keys[:30_000]]), 50):
        exact.add(part)
        bounded.add(part)
    assert exact.count() == 30_000 and exact.shift == 0
    # About 2,000 or more kept repeats: a standard error under 5 %, so 20 % fails by chance never.
    assert abs(bounded.count() - 30_000) < 6_000 and bounded.shift > 0
