"""What validate says of logs with one known fault each, and that a clean log has none."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from offtower.data import Catalogue, CatalogueSchema, Finding, LogSchema, TableLog, validate_log
from offtower.data.check import BadRowsError
from offtower.data.findings.texts import Variants
from offtower.data.findings.users import UserSample, users_in_both
from offtower.data.ingest import IngestSource, Split, ingest_files
from offtower.data.moments import Moments
from offtower.data.validate import ValidationReport
from offtower.mapping import merge_all
from tests.mappers import BACKWARDS

N, ITEMS = 4000, 300
START = datetime(2026, 1, 1)
SCHEMA = LogSchema.from_dict(
    {
        "context": [
            {"name": "age", "kind": "numeric"},
            {"name": "country", "kind": "category"},
        ],
        "action": "item",
        "reward": "click",
        "pscore": "p",
        "timestamp": "at",
        "user_id": "user",
    }
)


def columns() -> dict[str, Any]:
    """A uniform policy over 300 items: the mean of 1/pscore is 300."""
    rng = np.random.default_rng(0)
    return {
        "age": rng.integers(18, 90, N).astype(float),
        "country": rng.choice(["de", "fr", "us"], N),
        "item": [f"i{k}" for k in rng.integers(0, ITEMS, N)],
        "click": (rng.random(N) < 0.1) * 1.0,
        "p": np.full(N, 1 / ITEMS),
        "at": [START + timedelta(seconds=int(s)) for s in range(N)],
        "user": [f"u{k}" for k in rng.integers(0, 900, N)],
    }


def report(changed: dict[str, Any], schema: LogSchema = SCHEMA, **options: Any) -> ValidationReport:
    table = pa.table({k: pa.array(v) for k, v in {**columns(), **changed}.items()})
    items = pa.table({"item_id": [f"i{k}" for k in range(ITEMS)]})
    catalogue = Catalogue.from_table(items, CatalogueSchema())
    return validate_log(TableLog(table, schema, rows_per_group=700), catalogue, **options)


def only(found: ValidationReport) -> Finding:
    """The only remark."""
    (one,) = found.remarks
    return one


def changed(name: str, rows: list[int], value: Any) -> dict[str, Any]:
    values = list(columns()[name])
    for row in rows:
        values[row] = value
    return {name: values}


def test_a_clean_log_has_no_remark() -> None:
    assert report({}).remarks == ()


def test_doubled_rows_are_counted_and_shown() -> None:
    every = pa.table({k: pa.array(v) for k, v in columns().items()})
    table = pa.concat_tables([every, every.slice(100, 30)])
    found = only(report({name: table.column(name) for name in table.column_names}))
    assert (found.level, found.name, found.numbers["rows"]) == ("warning", "doubled rows", 30)
    assert found.examples == ("row 4000", "row 4001", "row 4002")


def test_doubled_rows_are_sampled_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 rows twice, of which a sixteenth or more is kept: the rows are fixed, so no chance."""
    monkeypatch.setattr("offtower.data.findings.rows._DOUBLED_KEYS", 500)
    every = pa.table({k: pa.array(v) for k, v in columns().items()})
    table = pa.concat_tables([every, every])
    found = only(report({name: table.column(name) for name in table.column_names}))
    assert found.message.startswith("about") and abs(found.numbers["rows"] - N) < 0.3 * N


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("age", -1.0, "'age' is -1 in 40 rows, beyond all other values (18 to 89)"),
        ("age", -999.0, "'age' is -999 in 40 rows"),
        ("age", 9999.0, "'age' is 9999 in 40 rows"),
        ("country", "NULL", "'country' is 'NULL' in 40 rows"),
        ("user", "-1", "all these rows count as one user"),
        ("at", datetime(1970, 1, 1), "40 timestamps are 0 or on 1970-01-01"),
    ],
)
def test_sentinels_are_named(name: str, value: Any, message: str) -> None:
    found = only(report(changed(name, list(range(0, N, 100)), value)))
    assert found.level == "warning" and found.name == "sentinel" and message in found.message
    assert found.numbers["rows"] == 40 and found.remedy and found.examples
    # Two in a hundred thousand rows would be; one of 4,000 is an accident.
    assert report(changed(name, [7], value)).remarks == ()


def test_codes_are_no_sentinels() -> None:
    rng = np.random.default_rng(1)
    for values in ([-1.0, 1.0], [-1.0, 0.0, 1.0], [-3.0, -1.0, 3.0], [999.0, 1000.0]):
        assert report({"age": rng.choice(values, N)}).remarks == ()


def test_mixed_time_units_are_an_error() -> None:
    seconds = np.array([t.replace(tzinfo=UTC).timestamp() for t in columns()["at"]]).astype(int)
    assert report({"at": seconds}).remarks == ()
    seconds[::10] *= 1000
    found = only(report({"at": seconds}))
    assert (found.level, found.name) == ("error", "time units")
    assert found.numbers == {"seconds": 3600.0, "milliseconds": 400.0}
    # Read as times, seconds among milliseconds lie in January 1970.
    times = [datetime.fromtimestamp(s / 1000, UTC) for s in np.where(seconds < 1e11, seconds, 1e12)]
    assert "time units" in {one.name for one in report({"at": times}).remarks}


def test_spaces_and_case_are_counted() -> None:
    rows = list(range(0, N, 50))
    spaced = only(report(changed("country", rows, " de ")))
    assert (
        spaced.name == "spaces" and spaced.numbers["rows"] == 80 and spaced.examples == ("' de '",)
    )
    by_case = only(report(changed("country", rows, "DE")))
    assert by_case.name == "case" and by_case.numbers["values"] == 1
    assert by_case.examples == ("'DE' / 'de'",)


def test_spellings_are_sampled_in_bounded_memory() -> None:
    """Each of 60,000 texts in two spellings, a hundred thousand too many to keep."""
    lower = pa.array([f"text{i}" for i in range(60_000)])
    upper = pa.array([f"TEXT{i}" for i in range(60_000)])
    found = merge_all(Variants.of(part) for part in (lower, upper.slice(0, 30_000)))
    assert found.shift > 0 and len(found.spellings) <= 10_000
    # About 30,000 / 2**shift of them: at least 3,750 kept, a standard error below 1.7 %; 10 % is
    # six of them (2e-9), and the texts are fixed.
    assert abs((len(found.several()) << found.shift) - 30_000) < 3000


def test_placeholder_propensities_are_an_error() -> None:
    found = only(report({"p": np.ones(N)}))
    assert (found.level, found.name) == ("error", "all propensities 1")


def test_percent_is_recognized_by_the_mean_of_the_inverse() -> None:
    """A softmax-like policy over 300 items; times 100 no propensity exceeds 1."""
    rng = np.random.default_rng(5)
    policy = rng.dirichlet(np.full(ITEMS, 4.0))
    shown = rng.choice(ITEMS, N, p=policy)
    log = {"item": [f"i{k}" for k in shown], "p": policy[shown]}
    assert report(log).ok
    found = only(report({**log, "p": 100 * policy[shown]}))
    assert found.level == "error" and "look like percent" in found.message
    assert found.numbers["mean"] == pytest.approx(3.0, abs=0.3)
    # A policy that shows only some items of each request is suspicious, not impossible.
    tenth = only(report({**log, "p": 10 * policy[shown]}))
    assert tenth.level == "warning" and "only a part of the catalogue" in tenth.message


def test_inverses_beyond_the_catalogue_are_an_error() -> None:
    found = only(report({"p": np.full(N, 1 / (2 * ITEMS))}))
    assert found.level == "error" and "too small" in found.message


def csv(path: Path, changed: dict[str, Any]) -> Path:
    table = pa.table({k: pa.array(v) for k, v in {**columns(), **changed}.items()})
    pacsv.write_csv(table, path)
    return path


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.log(np.full(N, 1 / ITEMS)), "look like logarithms"),
        (np.linspace(0.1, 40, N), "look like percent"),
    ],
)
def test_units_of_refused_propensities_are_named(
    scores: np.ndarray, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadRowsError, match=message):
        ingest_files(
            IngestSource(csv(tmp_path / "log.csv", {"p": scores}), SCHEMA), tmp_path / "out"
        )


def test_workers_find_the_same() -> None:
    rows = list(range(0, N, 50))
    faults = {**changed("country", rows, "DE"), **changed("age", rows, -1.0)}
    one, other = report(faults), report(faults, execution=BACKWARDS)
    assert one == other and len(one.remarks) == 2


def test_ingest_closes_with_what_looks_wrong(tmp_path: Path) -> None:
    source = csv(tmp_path / "log.csv", changed("age", list(range(0, N, 100)), -1.0))
    found = ingest_files(
        IngestSource(source, SCHEMA), tmp_path / "out", split=Split("row", (0.5, 0.5))
    )
    assert found.report is not None
    assert [one.name for one in found.report.remarks] == ["sentinel", "users in both parts"]
    users = ingest_files(
        IngestSource(source, SCHEMA), tmp_path / "users", split=Split("user", (0.5, 0.5))
    )
    assert users.report is not None
    assert [one.name for one in users.report.remarks] == ["sentinel"]


def test_users_of_both_parts_are_counted() -> None:
    def log(names: list[str]) -> TableLog:
        table = pa.table({k: pa.array(v[: len(names)]) for k, v in columns().items()})
        return TableLog(table.set_column(6, "user", pa.array(names)), SCHEMA)

    parts = {"train": log(["a", "b", "b", "c"]), "test": log(["b", "c", "d", "c"])}
    (found,) = users_in_both(parts, "row")
    assert (found.level, found.numbers["users"]) == ("warning", 2)
    assert [users_in_both(parts, by)[0].level for by in ("user", "time")] == ["error", "info"]
    assert users_in_both({"train": log(["a"]), "test": log(["b"])}) == []


def test_users_are_sampled_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offtower.data.findings.users._LIMIT", 5000)
    one, two = (
        UserSample.of(
            pa.chunked_array([pa.array(np.arange(a, a + 40_000))]) for a in (b, b + 20_000)
        )
        for b in (0, 30_000)
    )
    both, users = one.common(two)
    assert one.shift > 0 and len(one.key) <= 5000
    # 60,000 and 30,000 in truth, of which a fixed sixteenth or more is kept: 10 % is over 4
    # standard errors.
    assert abs(users - 60_000) < 6000 and abs(both - 30_000) < 3000


def test_moments_of_huge_values_overflow_to_infinity() -> None:
    """As float64 does; Python's power would raise."""
    one, other = Moments.of(np.array([1e300, 0.0])), Moments.of(np.array([-1e300, 1.0]))
    assert one.merge(other).square == np.inf and one.merge(other).largest == 1e300
