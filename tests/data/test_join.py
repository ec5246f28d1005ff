"""Joins of decisions with outcomes, against a dictionary of each row, and what they refuse."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from offtower.cli import app
from offtower.data import join
from offtower.data.join import JoinCounts, JoinedReward, JoinPlan, join_outcomes, join_tables
from offtower.data.join.files import join_files
from offtower.data.join.keys import find_keys
from offtower.errors import ConfigError, DataError

START = datetime(2026, 1, 1)
KEYS = (("round", "round"), ("position", "position"))


def decisions(n: int, rng: np.random.Generator) -> pa.Table:
    order = rng.permutation(n)
    return pa.table(
        {
            "round": pa.array([f"r{i // 3}" for i in order]),
            "position": pa.array(order % 3),
            "at": pa.array([START + timedelta(minutes=int(i)) for i in order]),
            "item": pa.array([f"i{i % 7}" for i in order]),
        }
    )


def outcomes(n: int, size: int, rng: np.random.Generator) -> pa.Table:
    """Of known decisions, of unknown ones, before their decision and up to 3 days after it."""
    which = rng.integers(0, n + n // 10, size)
    after = rng.integers(-60, 3 * 24 * 60, size)
    return pa.table(
        {
            "round": pa.array([f"r{i // 3}" for i in which]),
            "position": pa.array(which % 3),
            "paid": pa.array(
                [START + timedelta(minutes=int(i + m)) for i, m in zip(which, after, strict=True)]
            ),
            "amount": pa.array(rng.integers(0, 9, size) / 4.0, mask=rng.random(size) < 0.1),
        }
    )


def expected(
    table: pa.Table, events: pa.Table, rule: str, window: timedelta | None
) -> tuple[list[float | None], dict[str, int]]:
    """The join by a dictionary: one row at a time."""
    at = {(d["round"], d["position"]): d["at"] for d in table.to_pylist()}
    found: dict[tuple[str, int], list[tuple[datetime, int, float | None]]] = {}
    counts = dict.fromkeys(("unmatched", "early", "late"), 0)
    for number, event in enumerate(events.to_pylist()):
        key = (event["round"], event["position"])
        if key not in at:
            counts["unmatched"] += 1
        elif event["paid"] < at[key]:
            counts["early"] += 1
        elif window is not None and event["paid"] - at[key] > window:
            counts["late"] += 1
        else:
            found.setdefault(key, []).append((event["paid"], number, event["amount"]))
    rewards: list[float | None] = []
    for key in at:
        values = [v for _, _, v in sorted(found.get(key, [])) if v is not None]
        combine = {
            "sum": sum,
            "max": max,
            "first": lambda v: v[0],
            "any": lambda v: float(any(x != 0 for x in v)),
        }[rule]
        rewards.append(combine(values) if values else None)
    counts["rewarded"] = len(found)
    counts["several"] = sum(len(v) > 1 for v in found.values())
    return rewards, counts


@pytest.mark.parametrize("rule", ["sum", "max", "first", "any"])
@pytest.mark.parametrize("window", [None, "1d"])
def test_a_join_is_that_of_a_dictionary(
    rule: join.Rule, window: str | None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    table, events = decisions(400, rng), outcomes(400, 700, rng)
    plan = JoinPlan(KEYS, (JoinedReward("revenue", "amount", rule),), "at", "paid", window, "keep")

    def parts(whole: pa.Table) -> list[pa.Table]:
        return [whole.slice(i, 37) for i in range(0, whole.num_rows, 37)]

    joined = join_outcomes(lambda: parts(table), lambda: parts(events), plan, tmp_path)
    result = pa.concat_tables(joined.tables)
    wanted, counts = expected(table, events, rule, None if window is None else timedelta(days=1))
    # Quarters: sums are exact.
    assert result.column("revenue").to_pylist() == wanted
    assert result.drop_columns(["revenue"]).equals(table)
    assert min(counts["unmatched"], counts["early"], counts["several"]) > 0
    found = joined.counts.to_dict()
    assert {name: found[name] for name in counts} == counts
    assert (found["decisions"], found["outcomes"]) == (400, 700)


def small(**columns: list[object]) -> pa.Table:
    return pa.table({name: pa.array(values) for name, values in columns.items()})


ONE = JoinPlan((("k", "k"),), (JoinedReward("reward"),))


def test_a_decision_without_an_outcome_is_pending() -> None:
    joined = join_tables(small(k=["a", "b"]), small(k=["b"], reward=[0.0]), ONE)
    assert joined.column("reward").to_pylist() == [None, 0.0]


@pytest.mark.parametrize(
    ("left", "right", "plan", "message"),
    [
        (small(k=["a", "a"]), small(k=["a"], reward=[1.0]), ONE, "decisions 0 and 1 have the same"),
        (small(k=["a", None]), small(k=["a"], reward=[1.0]), ONE, "decision 1 has no key"),
        (small(k=["a"]), small(k=["a", "a"], reward=[1.0, 2.0]), ONE, "--rule sum, max"),
        (small(k=["a"]), small(k=["x"], reward=[1.0]), ONE, "none of the 1 outcomes belongs"),
        (small(k=["1"]), small(k=[1], reward=[1.0]), ONE, "write both as text"),
        (small(k=["a"], reward=[0]), small(k=["a"], reward=[1.0]), ONE, "already"),
        (small(k=["a"]), small(k=["a"], click=[1.0]), ONE, "no column 'reward'"),
        (
            small(k=["a"]),
            small(k=["a", "a"], reward=[1.0, 1.0]),
            JoinPlan((("k", "k"),), (JoinedReward("reward", None, "sum"),)),
            "--duplicates drop",
        ),
    ],
)
def test_what_cannot_be_joined_is_refused(
    left: pa.Table, right: pa.Table, plan: JoinPlan, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        join_tables(left, right, plan)


@pytest.mark.parametrize(("duplicates", "value"), [("drop", 1.0), ("keep", 2.0)])
def test_replayed_outcomes_count_as_stated(duplicates: join.Duplicates, value: float) -> None:
    events = small(k=["a", "a"], reward=[1.0, 1.0])
    plan = JoinPlan((("k", "k"),), (JoinedReward("reward", None, "sum"),), duplicates=duplicates)
    assert join_tables(small(k=["a"]), events, plan).column("reward").to_pylist() == [value]


def test_keys_with_one_equal_half_are_told_apart() -> None:
    """The second half of a hash decides where the first ones are equal."""
    keys = np.array([[5, 1], [5, 3], [5, 7], [9, 0]], dtype=np.uint64)
    wanted = np.array([[5, 7], [5, 2], [9, 0], [5, 1], [1, 1], [11, 0]], dtype=np.uint64)
    assert find_keys(keys, wanted).tolist() == [2, -1, 3, 0, -1, -1]


def test_several_rewards_by_their_own_rules() -> None:
    events = small(k=["a", "a", "b"], amount=[2.0, 3.0, None])
    rewards = (JoinedReward("click", None, "any"), JoinedReward("revenue", "amount", "sum"))
    joined = join_tables(small(k=["a", "b", "c"]), events, JoinPlan((("k", "k"),), rewards))
    assert joined.column("click").to_pylist() == [1.0, 1.0, None]
    assert joined.column("revenue").to_pylist() == [5.0, None, None]


def test_a_window_needs_times() -> None:
    with pytest.raises(ConfigError, match="window needs the time columns"):
        JoinPlan((("k", "k"),), (JoinedReward("reward"),), window="7d")


def test_the_verb_writes_the_log_and_its_schema(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table, events = decisions(60, rng), outcomes(60, 90, rng)
    pq.write_table(table, tmp_path / "day.parquet")
    pacsv.write_csv(events, tmp_path / "orders.csv")
    schema = {
        "log": {
            "action": "item",
            "reward": "revenue",
            "pscore": None,
            "timestamp": "at",
            "round_id": "round",
            "position": "position",
        }
    }
    (tmp_path / "day.schema.yaml").write_text(yaml.safe_dump(schema))
    out = tmp_path / "joined.parquet"
    arguments = ("join", str(tmp_path / "day.parquet"), str(tmp_path / "orders.csv"))
    arguments += ("--reward", "revenue=amount", "--rule", "sum", "--time", "paid")
    arguments += ("--window", "1d", "--missing", "0", "--out", str(out))
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout)
    wanted, known = expected(table, events, "sum", timedelta(days=1))
    assert pq.read_table(out).column("revenue").to_pylist() == wanted
    assert {name: counts[name] for name in known} == known
    written = yaml.safe_load((tmp_path / "joined.schema.yaml").read_text())["log"]
    newest = max(event["paid"] for event in events.to_pylist())
    assert written["outcomes"]["maturity"] == "1d" and written["outcomes"]["missing"] == 0.0
    assert str(written["outcomes"]["as_of"])[:19].replace("T", " ") == str(newest)
    assert "exists already" in " ".join(CliRunner().invoke(app, arguments).output.split())


def test_a_reward_of_missing_outcomes_needs_a_window(tmp_path: Path) -> None:
    arguments = ("join", "d.parquet", "o.csv", "--key", "k", "--reward", "r", "--missing", "0")
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out.parquet")])
    assert result.exit_code == 2
    assert "--missing needs --window and --time" in " ".join(result.output.split())


def test_a_joined_file_keeps_the_order_of_the_decisions(tmp_path: Path) -> None:
    n = 3000
    pq.write_table(
        pa.table({"k": pa.array(np.arange(n)), "x": pa.array(np.arange(n) % 5)}),
        tmp_path / "d.parquet",
        row_group_size=500,
    )
    shuffled = np.random.default_rng(1).permutation(n)[: n // 2]
    pq.write_table(
        pa.table({"k": pa.array(shuffled), "reward": pa.array(shuffled * 2.0)}),
        tmp_path / "o.parquet",
    )
    counts = join_files(tmp_path / "d.parquet", tmp_path / "o.parquet", tmp_path / "j.parquet", ONE)
    joined = pq.read_table(tmp_path / "j.parquet")
    assert joined.column("k").to_pylist() == list(range(n))
    wanted = np.full(n, np.nan)
    wanted[shuffled] = shuffled * 2.0
    np.testing.assert_array_equal(joined.column("reward").to_numpy(), wanted)
    assert counts == JoinCounts(decisions=n, outcomes=n // 2, rewarded=n // 2)
