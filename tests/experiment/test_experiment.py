"""A/B tests: validity of the martingale, readings, rows and plans."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from scipy.stats import norm
from typer.testing import CliRunner

from offtower.cli import app
from offtower.data import LogSchema, write_log
from offtower.errors import ConfigError, DataError, RunError
from offtower.experiment import (
    Assignment,
    Bets,
    DifferenceMartingale,
    ExperimentDesign,
    OfflineEvidence,
    plan_experiment,
    read_experiment,
)
from offtower.experiment.martingale import TermState
from offtower.experiment.plan import load_design
from offtower.experiment.rows import ArmColumns, Chunk, units_of_file, units_of_logs, user_units

DESIGN = ExperimentDesign(0.5, (0.0, 1.0), prior=0.1, prior_std_error=0.1)


def fixed_chunks(reward: Any, new: Any) -> Callable[[], Iterator[Chunk]]:
    chunk = (np.asarray(reward, dtype=np.float64), np.asarray(new, dtype=bool))
    return lambda: iter([chunk])


def drawn(units: int, gain: float, seed: int, share: float = 0.5) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    new = rng.random(units) < share
    return (rng.random(units) < np.where(new, 0.3 + gain, 0.3)).astype(np.float64), new


@pytest.mark.parametrize("bets", [Bets.unknown(1.0), Bets.around(0.3, 0.2), Bets.around(-1.0, 0.1)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_capital_has_mean_one_without_a_difference(bets: Bets, sign: float) -> None:
    """By enumeration of all rewards and assignments of four units."""
    rate, assignment, mean, total = 0.3, Assignment(0.4, (0.0, 1.0)), 0.0, 0.0
    assert math.isclose(np.exp(bets.log_weight).sum(), 1.0) and (bets.effect > 0.0).all()
    for outcome in itertools.product((0, 1), repeat=8):
        reward, new = np.array(outcome[:4], dtype=np.float64), np.array(outcome[4:], dtype=bool)
        probability = np.prod(np.where(reward == 1, rate, 1 - rate) * np.where(new, 0.4, 0.6))
        martingale = DifferenceMartingale(assignment, bets, 0.0, sign)
        mean += probability * math.exp(martingale.add(TermState(assignment).take(reward, new))[-1])
        total += probability
    assert total == pytest.approx(1.0, abs=1e-12) and mean == pytest.approx(1.0, abs=1e-12)


def test_parts_of_the_rows_give_what_all_of_them_give() -> None:
    reward, new = drawn(300, 0.1, seed=0)
    whole = DifferenceMartingale(DESIGN.assignment, DESIGN.bets, 0.02)
    state = TermState(DESIGN.assignment)
    expected = whole.add(state.take(reward, new))
    parts = DifferenceMartingale(DESIGN.assignment, DESIGN.bets, 0.02)
    grid = DifferenceMartingale(DESIGN.assignment, DESIGN.bets, np.array([0.02, -0.02]))
    other, found = TermState(DESIGN.assignment), []
    for start in range(0, 300, 70):
        increments = other.take(reward[start : start + 70], new[start : start + 70])
        found.append(parts.add(increments))
        ends = grid.add_total(increments)
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-10, atol=1e-10)
    assert ends[0] == pytest.approx(expected[-1]) and ends[1] > ends[0]
    assert other.estimate == pytest.approx(float(state.estimate))
    # The mean of the terms is the difference of the arms, up to their noise about the center.
    difference = reward[new].mean() - reward[~new].mean()
    assert float(state.estimate) == pytest.approx(difference, abs=0.05)


def false_launches(tests: int, units: int) -> int:
    """Tests without a difference that launch, read after every unit with an optimistic prior."""
    launched = 0
    for seed in range(-(-tests // 100)):
        rng = np.random.default_rng(seed)
        martingale = DifferenceMartingale(DESIGN.assignment, DESIGN.bets, 0.0)
        state = TermState(DESIGN.assignment, (100,))
        new = rng.random((100, units)) < 0.5
        reward = (rng.random((100, units)) < 0.3).astype(np.float64)
        evidence = martingale.add(state.take(reward, new))
        launched += int((evidence.max(axis=1) >= math.log(20.0)).sum())
    return launched


def test_false_launches_under_constant_peeking() -> None:
    # A rate of .05 exceeds 39 of 400 with probability 1e-4.
    assert false_launches(400, 500) <= 39


@pytest.mark.slow
def test_false_launches_under_constant_peeking_in_ten_thousand_tests() -> None:
    assert false_launches(10_000, 800) <= 500


def test_bounds_hold_and_contain_the_estimate() -> None:
    # Each bound fails with probability at most .05 at one reading; 28 of 200 has 1e-6.
    low = high = 0
    for seed in range(200):
        reading = read_experiment(DESIGN, fixed_chunks(*drawn(250, 0.1, seed)))
        assert reading.low <= reading.estimate <= reading.high
        low, high = low + (reading.low > 0.1), high + (reading.high < 0.1)
    assert low <= 28 and high <= 28


def test_bounds_of_rewards_without_variance_are_informative() -> None:
    """Eight standard errors are then nearer than any difference that the bets refute."""
    new = np.arange(600) % 2 == 0
    apart = read_experiment(DESIGN, fixed_chunks(new, new))
    assert apart.decision == "launch" and apart.low > 0.5 and apart.high == 1.0
    equal = read_experiment(DESIGN, fixed_chunks(np.ones(600), new))
    assert equal.decision == "continue" and -0.2 < equal.low < 0.0 < equal.high < 0.2


def test_a_decision_stands_in_every_later_reading() -> None:
    reward, new = drawn(4000, 0.15, seed=3)
    whole = read_experiment(DESIGN, fixed_chunks(reward, new))
    assert whole.decision == "launch" and whole.exit_code == 0 and whole.p_value < 0.05
    assert whole.low > 0.0 and whole.decided_at is not None
    at = whole.decided_at
    before, after = (
        read_experiment(DESIGN, fixed_chunks(reward[:n], new[:n])) for n in (at - 1, at)
    )
    assert before.decision == "continue" and before.exit_code == 3 and before.more_units is not None
    assert after.decision == "launch" and after.decided_at == at
    # The same with the arms exchanged: the new policy is worse.
    worse = read_experiment(DESIGN, fixed_chunks(reward, ~new))
    assert worse.decision == "stop" and worse.exit_code == 1 and worse.high < 0.0


def test_what_a_test_cannot_be_read_from() -> None:
    reward, new = drawn(2000, 0.2, seed=1, share=0.6)
    mismatch = read_experiment(DESIGN, fixed_chunks(reward, new))
    assert mismatch.mismatch and mismatch.decision == "continue"
    with pytest.raises(DataError, match="units of both arms"):
        read_experiment(DESIGN, fixed_chunks([1.0, 0.0], [True, True]))
    with pytest.raises(DataError, match="unit 1 has the reward 2, outside of the plan's range"):
        read_experiment(DESIGN, fixed_chunks([1.0, 2.0], [True, False]))
    for wrong in ({"share": 1.0}, {"alpha": 0.0}, {"prior_std_error": None}):
        with pytest.raises(ConfigError):
            ExperimentDesign(**{"share": 0.5, "reward_range": (0.0, 1.0), "prior": 0.1, **wrong})


def table(rows: int = 8) -> pa.Table:
    time = pa.array(np.arange(rows) * 86_400_000_000, pa.timestamp("us"))
    return pa.table(
        {
            "arm": ["a", "b"] * (rows // 2),
            "reward": [float(i % 3 == 0) for i in range(rows)],
            "time": time,
            "user": [f"u{i % 4}" for i in range(rows)],
        }
    )


def read_all(chunks: Iterator[Chunk]) -> tuple[list[float], list[bool]]:
    parts = list(chunks)
    return (
        [float(x) for reward, _ in parts for x in reward],
        [bool(x) for _, new in parts for x in new],
    )


def test_rows_of_files(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "rows.parquet")
    pa.csv.write_csv(table(), tmp_path / "rows.csv")
    expected = ([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0], [False, True] * 4)
    for name in ("rows.parquet", "rows.csv"):
        for time in (None, "time"):
            found = read_all(units_of_file(tmp_path / name, ArmColumns("b", time=time)))
            assert found == expected
    three = table().set_column(0, "arm", pa.array(["a", "b", "c", "b", "a", "b", "a", "b"]))
    pq.write_table(three, tmp_path / "three.parquet")
    with pytest.raises(DataError, match=r"arms a, c beside 'b': .*--current"):
        read_all(units_of_file(tmp_path / "three.parquet", ArmColumns("b")))
    found = read_all(units_of_file(tmp_path / "three.parquet", ArmColumns("b", "a")))
    assert found == (
        [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0],
        [False, True, True, False, True, False, True],
    )
    pq.write_table(table().take(pa.array([1, 0])), tmp_path / "back.parquet")
    with pytest.raises(DataError, match="row 1: its time is before"):
        read_all(units_of_file(tmp_path / "back.parquet", ArmColumns("b", time="time")))
    null = table().set_column(1, "reward", pa.array([1.0, None] * 4))
    pq.write_table(null, tmp_path / "null.parquet")
    with pytest.raises(DataError, match="row 1: column 'reward' is null"):
        read_all(units_of_file(tmp_path / "null.parquet", ArmColumns("b")))


def test_users_count_once_when_their_window_is_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a window"):
        ArmColumns("b", user="user")
    columns = ArmColumns("b", time="time", user="user", window="5d")
    pq.write_table(table(), tmp_path / "rows.parquet")
    # u0 has rows on days 0 and 4 (rewards 1, 0), u1 on 1 and 5, u2 on 2 and 6; u3's is not over.
    found = read_all(units_of_file(tmp_path / "rows.parquet", columns))
    assert found == ([0.5, 0.0, 0.5], [False, True, False])
    # More rows add users, and change none.
    pq.write_table(table(12), tmp_path / "more.parquet")
    more = read_all(units_of_file(tmp_path / "more.parquet", columns))
    assert more[0][:3] == found[0] and len(more[0]) == 4
    both = np.array(["u", "u"], dtype=object)
    with pytest.raises(DataError, match="user 'u' is in both arms"):
        list(user_units(np.ones(2), np.array([True, False]), np.arange(2), both, 1))


def test_logs_are_merged_by_time(tmp_path: Path) -> None:
    schema = LogSchema(pscore="pscore", timestamp="time")
    for name, first, reward in (("old", 0, 0.0), ("new", 1, 1.0)):
        time = pa.array(np.arange(first, 8, 2) * 10**6, pa.timestamp("us"))
        rows = {"action": ["x"] * 4, "reward": [reward] * 4, "pscore": [1.0] * 4, "time": time}
        write_log(tmp_path / name, [pa.table(rows)], schema)
    found = read_all(units_of_logs(tmp_path / "new", tmp_path / "old"))
    assert found == ([0.0, 1.0] * 4, [False, True] * 4)


EVIDENCE = OfflineEvidence("a", 0.08, 0.04, -0.01, 0.3 * 0.7, (0.0, 1.0))


def test_plan_detects_its_effect_in_fewer_units() -> None:
    plan = plan_experiment(EVIDENCE)
    moment = 0.21 / 0.25
    fixed = (norm.ppf(0.95) + norm.ppf(0.8)) ** 2 * moment / 0.08**2
    assert plan.fixed_units == math.ceil(fixed) and plan.design.share == 0.5
    at, further, _ = plan.detections
    assert 0.8 <= at.power < 0.83 and further.effect == pytest.approx(0.12)
    assert further.power > 0.95 and further.mean_units < 0.7 * plan.fixed_units
    # The simulation agrees with tests of clicks: at power .8, 33 of 60 or fewer has 2e-6.
    launched = sum(
        read_experiment(plan.design, fixed_chunks(*drawn(plan.units, 0.08, seed))).decision
        == "launch"
        for seed in range(60)
    )
    assert launched >= 34
    units = {share: needed for share, needed, _ in plan.shares}
    assert units[0.5] < units[0.25] < units[0.1] < units[0.05]
    assert plan_experiment(EVIDENCE, units=units[0.1]).design.share == 0.1
    assert plan_experiment(EVIDENCE, share=0.3).design.share == 0.3
    assert plan_experiment(EVIDENCE, units=500).units == 500
    worse = OfflineEvidence("a", -0.08, 0.04, -0.1, 0.21, (0.0, 1.0))
    with pytest.raises(ConfigError, match="--effect"):
        plan_experiment(worse)
    assert plan_experiment(worse, effect=0.05).effect == 0.05
    for effect, said in (
        (1e-12, "no test has: with so many, an effect of 2.3e-05"),
        (1.5, "allow"),
    ):
        with pytest.raises(ConfigError, match=said):
            plan_experiment(EVIDENCE, effect=effect)


def test_verbs_plan_and_read(tmp_path: Path) -> None:
    gap = {"value": 0.08, "std_error": 0.04, "interval": {"low": -0.01}}
    log = {
        "policies": {"a": {"estimates": {"snips": {"difference": gap}}}},
        "decide_by": "snips",
        "reward_range": [0.0, 1.0],
        "logging": {"std_error": 0.01},
        "n": 2100,
    }
    (tmp_path / "report.json").write_text(json.dumps({"logs": [log]}))
    runner = CliRunner()
    done = runner.invoke(app, ["experiment", "plan", str(tmp_path), "--share", "0.5"])
    assert done.exit_code == 0, done.output
    assert "give the new policy 50% of the requests" in done.output
    plan = tmp_path / "experiment.json"
    design = load_design(plan)
    assert design.prior == 0.08 and design.share == 0.5
    reward, new = drawn(3000, 0.15, seed=0)
    rows = pa.table({"arm": np.where(new, "b", "a"), "reward": reward})
    pq.write_table(rows, tmp_path / "rows.parquet")
    read = ["experiment", "read", str(plan), "--rows", str(tmp_path / "rows.parquet")]
    shown = runner.invoke(app, [*read, "--new", "b"])
    assert shown.exit_code == 0 and "launch: decided after" in shown.output, shown.output
    content = json.loads(runner.invoke(app, [*read, "--new", "b", "--json"]).stdout)
    assert content["decision"] == "launch" and content["exit_code"] == 0
    assert runner.invoke(app, [*read, "--new", "a"]).exit_code == 1
    assert runner.invoke(app, ["experiment", "read", str(plan)]).exit_code == 2
    plan.write_text(plan.read_text().replace('"alpha": 0.05', '"alpha": 0.5'))
    with pytest.raises(RunError, match="changed after it was written"):
        load_design(plan)
    with pytest.raises(RunError, match="evaluate the run first"):
        OfflineEvidence.of_report(tmp_path / "none.json")
