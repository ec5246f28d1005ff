"""A served log against the run that served it: what is right passes, what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

pytest.importorskip("uvicorn")

from prometheus_client.parser import text_string_to_metric_families

from offtower.cli import app
from offtower.config import ServingConfig
from offtower.data import LogSchema, write_log
from offtower.data.simulate import SimulatedWorld
from offtower.errors import ConfigError, DataError, RunError
from offtower.monitoring import MonitorReport, accumulator, monitor_run
from offtower.monitoring.prometheus import metrics_text
from offtower.monitoring.run import open_log
from offtower.retrieval import Retriever, decisions_table, served_schema
from offtower.run_directory import RunDirectory
from offtower.server import DecisionSettings, ServerSettings
from tests.retrieval.serving import serving

DAYS, ROWS = 3, 800
Change = Callable[[pa.Table], pa.Table]


def column(name: str, values: Callable[[pa.ChunkedArray], Any]) -> Change:
    def change(table: pa.Table) -> pa.Table:
        made = values(table.column(name))
        return table.set_column(table.column_names.index(name), name, made)

    return change


@pytest.fixture(scope="module")
def served(exported: Path, world: SimulatedWorld) -> tuple[pa.Table, LogSchema]:
    """Three days of decisions of an exploring policy, with rewards by chance."""
    retriever = Retriever.open(exported, serving=ServingConfig())
    rng, tables = np.random.default_rng(0), []
    for day in range(DAYS):
        contexts = world.contexts(ROWS, seed=20 + day)
        users = pa.array([f"{day} {row}" for row in range(ROWS)])
        drawn = retriever.sample(contexts, k=2, mode="exact", seed=day)
        at = datetime(2026, 3, 1, tzinfo=UTC) + timedelta(days=day)
        table = decisions_table(
            retriever, contexts.append_column("user_id", users), drawn, served_at=at
        )
        seconds = np.repeat(np.arange(ROWS) * 100, 2).astype("timedelta64[s]")
        times = pa.array(table.column("timestamp").to_numpy() + seconds)
        table = table.set_column(table.column_names.index("timestamp"), "timestamp", times)
        reward = (rng.random(table.num_rows) < 0.5).astype(float)
        tables.append(table.append_column("reward", pa.array(reward)))
    return pa.concat_tables(tables), served_schema(retriever)


@pytest.fixture
def watched(
    served: tuple[pa.Table, LogSchema], run: Path, tmp_path: Path
) -> Callable[..., MonitorReport]:
    """Monitor the log after a change of its rows or of its schema."""

    def made(change: Change = lambda table: table, *overrides: str, **schema: Any) -> MonitorReport:
        table, known = served
        write_log(tmp_path / "log", [change(table)], replace(known, **schema), 1000)
        return monitor_run(run, tmp_path / "log", overrides=overrides)

    return made


def breached(report: MonitorReport) -> set[tuple[str, str]]:
    return {(one.name, one.subject) for one in report.breached}


def test_a_log_as_it_was_served_breaches_nothing(watched: Callable[..., MonitorReport]) -> None:
    report = watched()
    assert breached(report) == set() and report.exit_code == 0 and not report.notes
    assert (report.rows, report.units) == (2 * DAYS * ROWS, DAYS * ROWS)
    assert [day.name for day in report.days] == ["2026-03-01", "2026-03-02", "2026-03-03"]
    assert all(day.rows == 2 * ROWS for day in report.days)
    checks = {(one.name, one.subject): one for one in report.checks}
    weight = checks["mean_weight", ""]
    assert abs(weight.value - 1.0) < 1e-5 and weight.high is not None and weight.low is not None
    assert checks["unequal_propensities", ""].value == 0.0
    assert abs(checks["value", ""].value - 0.5) < 0.05
    features = {subject for name, subject in checks if name == "feature_drift"}
    assert {"context (norm)", "activity", "segment", "interests"} <= features


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (column("pscore", lambda c: pa.array(c.to_numpy() / 2)), ("mean_weight", "")),
        (
            column("pscore", lambda c: pa.array(np.minimum(1.0, c.to_numpy() * 1.5))),
            ("unequal_propensities", ""),
        ),
        (column("activity", lambda c: pa.array(c.to_numpy() + 2.0)), ("feature_drift", "activity")),
        (
            column("segment", lambda c: pa.array(["new"] * len(c))),
            ("unknown_values", "segment"),
        ),
        (column("reward", lambda c: pa.array(c.to_numpy() * 0.1)), ("value", "")),
        (
            column("reward", lambda c: pa.array(np.where(np.arange(len(c)) < 1600, c, 0.0))),
            ("value", "2026-03-03"),
        ),
        (
            column("reward", lambda c: pa.array(np.where(np.arange(len(c)) < 1600, c, 0.0))),
            ("reward_drift", ""),
        ),
        (
            column("action", lambda c: pa.array(["gone", *c.to_pylist()[1:-1], "too"])),
            ("unknown_items", ""),
        ),
        (
            column("pscore", lambda c: pa.array([2.0] * 20 + c.to_pylist()[20:])),
            ("bad_rows", ""),
        ),
    ],
)
def test_what_is_wrong_is_named(
    change: Change, expected: tuple[str, str], watched: Callable[..., MonitorReport]
) -> None:
    overrides = ["monitor.max_unknown_items=0.0001"] if expected[0] == "unknown_items" else []
    report = watched(change, *overrides)
    assert expected in breached(report) and report.exit_code == 1
    assert all(one.text for one in report.checks)


def test_a_client_that_drops_likely_items_is_found(watched: Callable[..., MonitorReport]) -> None:
    """Every weight of the policy itself stays 1."""

    def dropped(table: pa.Table) -> pa.Table:
        first = table.column("pscore").to_numpy()[::2]
        return table.filter(pa.array(np.repeat(first < np.quantile(first, 0.7), 2)))

    report = watched(dropped)
    assert breached(report) & {("mean_weight", ""), ("softer_mean_weight", "")} == {
        ("softer_mean_weight", "")
    }
    found = next(one for one in report.checks if one.name == "softer_mean_weight")
    assert found.low is not None and found.low > 1.05 and "drops them" in found.text


def test_rows_of_unknown_items_are_counted_and_left_out(
    watched: Callable[..., MonitorReport],
) -> None:
    report = watched(column("action", lambda c: pa.array(["gone", *c.to_pylist()[1:-1], "too"])))
    found = next(one for one in report.checks if one.name == "unknown_items")
    assert "lacks 2 of" in found.text and "gone, too" in found.text
    # Their rounds have no other good row.
    assert report.units == DAYS * ROWS - 2
    assert next(one for one in report.checks if one.name == "bad_rows").value == 0.0


def test_sums_do_not_depend_on_row_groups_or_on_a_sample(
    served: tuple[pa.Table, LogSchema], run: Path, tmp_path: Path
) -> None:
    table, schema = served
    found = []
    for number, rows in enumerate((500, 100_000)):
        write_log(tmp_path / f"{number}", [table], schema, rows)
        report = monitor_run(run, tmp_path / f"{number}", overrides=["monitor.weight_rows=1000"])
        found.append(report)
    one, other = found
    assert [a.name for a in one.checks] == [b.name for b in other.checks]
    for a, b in zip(one.checks, other.checks, strict=True):
        assert np.allclose([a.value, a.low or 0.0], [b.value, b.low or 0.0], rtol=1e-9, atol=1e-9)
    weight = next(check for check in one.checks if check.name == "mean_weight")
    sampled = int(weight.text.split(" of ")[1].split(" ")[0])
    assert 400 < sampled < 600  # 1,000 of 4,800 rows: 500 of 2,400 rounds, deviation 20.


def test_another_log_is_the_reference(
    watched: Callable[..., MonitorReport],
    served: tuple[pa.Table, LogSchema],
    run: Path,
    tmp_path: Path,
) -> None:
    watched(column("activity", lambda c: pa.array(c.to_numpy() + 2.0)))
    report = monitor_run(run, tmp_path / "log", reference=tmp_path / "log")
    # The policy gives other propensities to the changed features.
    assert breached(report) == {("unequal_propensities", "")}
    drift = [one.value for one in report.checks if one.name == "feature_drift"]
    assert max(drift) == 0.0
    with pytest.raises(DataError, match="--reference: there is no log"):
        monitor_run(run, tmp_path / "log", reference=tmp_path / "none")


def test_features_of_a_down_sampled_reference_are_not_compared(
    watched: Callable[..., MonitorReport],
    served: tuple[pa.Table, LogSchema],
    run: Path,
    tmp_path: Path,
) -> None:
    """Nine in ten rows of low activity were left out."""
    watched()
    table, schema = served
    table = column("reward", lambda c: pa.array(c.to_numpy() * 0.8))(table)
    activity, reward = (table.column(name).to_numpy() for name in ("activity", "reward"))
    kept = (activity > np.median(activity)) | (np.arange(len(activity)) % 10 == 0)
    rate = np.where(activity > np.median(activity), 1.0, 0.1)
    sampled = table.append_column("rate", pa.array(rate)).filter(pa.array(kept))
    plain = replace(schema, position=None, pscore_kind=None, round_id=None, weight="rate")
    write_log(tmp_path / "reference", [sampled], plain)
    report = monitor_run(run, tmp_path / "log", reference=tmp_path / "reference")
    assert breached(report) == set()
    assert not [one for one in report.checks if one.name == "feature_drift"]
    assert [note for note in report.notes if "rows of" in note and "have weights" in note]
    (value,) = [one for one in report.checks if one.name == "value"]
    assert value.threshold is not None
    mean = np.average(reward[kept], weights=1.0 / rate[kept])
    assert abs(value.threshold - 0.8 * mean) < 1e-9


def test_logs_that_cannot_be_monitored(
    served: tuple[pa.Table, LogSchema], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, schema = served
    plain = replace(schema, position=None, pscore_kind=None, round_id=None)
    fewer = tuple(spec for spec in schema.context if spec.name != "activity")
    items = table.column_names.index("action")
    foreign = table.set_column(items, "action", pa.array(["gone"] * table.num_rows))
    weighed = table.append_column("rate", pa.array([0.5] * table.num_rows))
    cases: list[tuple[pa.Table, LogSchema, tuple[str, ...], str]] = [
        (table, replace(plain, pscore=None), (), r"no propensities \(schema key 'pscore'\)"),
        (table, replace(plain, timestamp=None), (), r"no timestamps \(schema key 'timestamp'\)"),
        (table, replace(schema, context=fewer), (), "another schema .*lacks 'activity'"),
        (foreign, schema, (), "no good row: 0 break its schema, and 4,800 show items"),
        (weighed, replace(plain, weight="rate"), (), "row weights"),
        (table, schema, ("monitor.period=1s",), "more than 2 days of monitor.period = 1s"),
    ]
    monkeypatch.setattr(accumulator, "MOST_DAYS", 2)
    for number, (rows, known, overrides, message) in enumerate(cases):
        write_log(tmp_path / f"{number}", [rows], known)
        with pytest.raises(DataError, match=message):
            monitor_run(run, tmp_path / f"{number}", overrides=overrides)
    numbers = pa.array(np.arange(table.num_rows) % 7 + 5)
    index = table.column_names.index("timestamp")
    write_log(tmp_path / "numbers", [table.set_column(index, "timestamp", numbers)], plain)
    with pytest.raises(DataError, match="are no dates"):
        monitor_run(run, tmp_path / "numbers")
    pq.write_table(table.slice(0, 0), tmp_path / "0" / "part-00000.parquet")
    (tmp_path / "0" / "_offtower.json").unlink()
    config = RunDirectory(run).load_config()
    config.data.log_schema = schema.to_dict()
    with pytest.raises(DataError, match="no rows"):
        open_log(tmp_path / "0", config)
    with pytest.raises(ConfigError, match="only keys of 'monitor'"):
        monitor_run(run, tmp_path / "numbers", overrides=["evaluation.confidence=0.9"])
    with pytest.raises(RunError, match="no policy at"):
        monitor_run(tmp_path, tmp_path / "numbers")


def test_metrics_are_those_of_the_report(watched: Callable[..., MonitorReport]) -> None:
    report = watched(column("activity", lambda c: pa.array(c.to_numpy() + 2.0)))
    text = metrics_text(report, 12.5).decode()
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    run = ("run", "small")
    assert samples["offtower_monitor_time_seconds", (run,)] == 12.5
    assert samples["offtower_monitor_rows", (run,)] == report.rows
    assert samples["offtower_monitor_breached_checks", (run,)] == len(report.breached) >= 1
    for one in report.checks:
        labels = (("check", one.name), run, ("subject", one.subject))
        assert samples["offtower_monitor_check", labels] == one.value
        assert samples["offtower_monitor_check_breached", labels] == one.breached
    for day in report.days:
        assert samples["offtower_monitor_day_value", (("day", day.name), run)] == day.value


def call(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def test_serve_join_ingest_monitor(
    exported: Path, run: Path, world: SimulatedWorld, tmp_path: Path
) -> None:
    contexts = world.contexts(60, seed=31)
    users = pa.array([f"user {row}" for row in range(60)])
    log = tmp_path / "served"
    settings = ServerSettings(exported, DecisionSettings(str(log)), mode="exact")
    with serving(settings) as client:
        client.arrow("/sample?k=2", contexts.append_column("user_id", users))
    (folder,) = (one for one in log.iterdir() if one.is_dir() and one.name[0] != ".")
    logged = pq.read_table(folder)
    pq.write_table(logged.select(["round_id", "position"]), tmp_path / "clicks.parquet")
    clicks, joined = tmp_path / "clicks.parquet", tmp_path / "j.parquet"
    call("join", folder, clicks, "--rule", "any", "--out", joined)
    catalogue = Path(str(RunDirectory(run).load_config().data.catalogue)) / "part-00000.parquet"
    call(
        *("ingest", joined, "--schema", tmp_path / "j.schema.yaml"),
        *("--catalogue", catalogue, "--out", tmp_path / "taken"),
    )
    metrics = tmp_path / "metrics" / "offtower.prom"
    arguments = ("monitor", run, "--log", tmp_path / "taken" / "log")
    found = json.loads(call(*arguments, "--json", "--prometheus", metrics))
    assert found["exit_code"] == 0 and found["breached"] == [] and found["rows"] == 120
    assert [one.name for one in metrics.parent.iterdir()] == ["offtower.prom"]
    limit = ("--set", "monitor.min_items_shown=0.9")
    found = json.loads(call(*arguments, "--json", *limit, code=1))
    assert found["breached"] == ["items_shown"]
    call(*arguments, *limit, "--exit-zero")
    call("monitor", run, "--log", tmp_path / "none", code=2)
