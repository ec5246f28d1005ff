"""Values over time: sums, drift, forecasts and verdicts, against worlds of known values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binom

from offtower.config import TimeOptions
from offtower.data.log import Log
from offtower.errors import ConfigError, DataError
from offtower.evaluation import EvaluationRows, evaluate_rows
from offtower.evaluation.drift import TimeGrid
from offtower.evaluation.drift.forecast import INTEGRATED_WALKS, RANDOM_WALKS, predict
from offtower.evaluation.drift.hypotheses import drift_p, holm
from offtower.evaluation.drift.serial import widening
from offtower.evaluation.drift.series import Series
from offtower.evaluation.estimators import IPS
from offtower.evaluation.intervals.statistics import Statistics, collect
from offtower.evaluation.intervals.time_sums import DAY, MAX_BINS, WEEK, TimeSums
from offtower.evaluation.scoring.clock import LogClock

MONDAY = 1_767_571_200_000_000


def times(n: int, weeks: float = 6.0) -> np.ndarray:
    """(n,) evenly spaced times from a Monday on."""
    return (MONDAY + (np.arange(n) + 0.5) * (weeks * WEEK / n)).astype(np.int64)


def statistics(reward: np.ndarray, time: np.ndarray) -> Statistics:
    rows = EvaluationRows(np.ones_like(reward), reward, time=time)
    return collect(IPS().terms(rows), rows, timed=True, grouped=True)


def grid_of(n: int = 4200, weeks: float = 6.0, **options: object) -> TimeGrid:
    found = statistics(np.ones(n), times(n, weeks)).time
    assert found is not None
    return TimeGrid.of(found, TimeOptions(**options))  # type: ignore[arg-type]


def of_cells(value: np.ndarray, noise: float) -> Series:
    return Series(value, np.ones_like(value), np.full_like(value, noise), 400.0)


def at_least(hits: int, n: int, share: float) -> bool:
    """Whether so many hits are not too few for a share, at an error of 1e-4."""
    return bool(binom.cdf(hits, n, share) > 1e-4)


@pytest.mark.parametrize("spread", [1, 10**3, 60 * 10**6, 3 * DAY])
def test_sums_by_time_are_those_of_all_rows_in_any_order_of_shards(spread: int) -> None:
    rng = np.random.default_rng(spread)
    time = MONDAY + rng.integers(0, 3000, 5000) * spread
    terms, weight = rng.normal(size=(5000, 2)), rng.random(5000) + 0.5
    unit = rng.integers(0, 2**62, 5000)
    whole = TimeSums.of(time, unit, terms, weight)
    parts = [
        TimeSums.of(time[part], unit[part], terms[part], weight[part])
        for part in np.array_split(rng.permutation(5000), 9)
    ]
    merged = parts[3]
    for part in [*parts[4:], *parts[:3]]:
        merged = part.merge(merged)
    assert merged.level == whole.level and np.array_equal(merged.key, whole.key)
    np.testing.assert_allclose(merged.total, whole.total, atol=1e-10)
    np.testing.assert_allclose(merged.count, whole.count)
    bins = np.unique(whole.bins)
    assert bins.size <= MAX_BINS and (whole.first, whole.last) == (time.min(), time.max())
    inside = (time >= whole.start(int(bins[2]))) & (time < whole.start(int(bins[2]) + 1))
    direct = (weight[:, None] * terms)[inside].sum(axis=0)
    np.testing.assert_allclose(whole.total[whole.bins == bins[2]].sum(axis=0), direct)


def test_six_weeks_have_weeks_of_days_and_the_next_week() -> None:
    grid = grid_of()
    assert grid.unit == "week" and [one.name for one in grid.periods][-1] == "week 6"
    assert grid.cells == 42 and grid.seasons == ("day of the week",)
    assert grid.future_name == "the next week"
    assert grid.future_time == pytest.approx(1.0 + 0.5 / 6.0)
    # Over whole weeks, seasons have mean 0 in the log and in the future.
    np.testing.assert_allclose(grid.season.mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(grid.future_season, 0.0, atol=1e-12)
    longer = grid_of(horizon=2, period="3d")
    assert longer.future_length == pytest.approx(1.0 / 7.0)
    assert longer.future_name == "the next 2 periods of 3 days"


def test_times_that_are_no_dates_have_equal_periods() -> None:
    found = statistics(np.ones(2000), np.arange(2000)).time
    assert found is not None
    grid = TimeGrid.of(found, TimeOptions())
    assert grid.unit == "period" and len(grid.periods) == 8 and not grid.seasons
    with pytest.raises(DataError, match=r"period is '7d'.*no dates"):
        TimeGrid.of(found, TimeOptions(period="7d"))


def test_times_that_say_nothing_are_explained() -> None:
    rows = EvaluationRows(np.ones(400), np.arange(400) % 2.0, time=np.full(400, MONDAY))
    found = evaluate_rows({"new": rows}, reward_range=(0, 1)).time
    assert found is not None and "same time" in str(found.reason)
    rows = replace(rows, time=times(400, 1.0))
    options = TimeOptions(period="30d")
    found = evaluate_rows({"new": rows}, reward_range=(0, 1), time=options).time
    assert found is not None and "one period (30 days)" in str(found.reason)
    found = evaluate_rows({"new": rows}, reward_range=(0, 1), time=TimeOptions(period="84h")).time
    assert found is not None and "at least 3" in str(found.reason) and found.periods
    found = evaluate_rows({"new": rows}, reward_range=(0, 1), time=TimeOptions(horizon=9)).time
    assert found is not None and "evaluation.time.horizon" in str(found.reason)
    few = evaluate_rows({"new": rows.take(slice(0, 50))}, reward_range=(0, 1)).time
    assert few is not None and "the log has 50 rows" in str(few.reason)
    some = evaluate_rows({"new": rows.take(slice(0, 100))}, reward_range=(0, 1)).time
    assert some is not None and [one.rows for one in some.periods] == [57, 43]
    untimed = {"new": replace(rows, time=None)}
    assert evaluate_rows(untimed, reward_range=(0, 1)).time is None
    with pytest.raises(ConfigError, match=r"evaluation\.time\.period needs the time of each row"):
        evaluate_rows(untimed, reward_range=(0, 1), time=TimeOptions(period="7d"))
    with pytest.raises(ConfigError, match="expected a number with a unit"):
        TimeOptions(period="7 moons")
    with pytest.raises(ConfigError, match="horizon must be at least 1"):
        TimeOptions(horizon=0)


def test_a_series_splits_the_value_and_its_variance() -> None:
    rng = np.random.default_rng(5)
    reward, time = rng.normal(size=8400), times(8400)
    found = statistics(reward, time)
    assert found.time is not None
    grid = TimeGrid.of(found.time, TimeOptions())
    series = Series.of(grid, IPS(), found)
    day = (time - MONDAY) // DAY
    np.testing.assert_allclose(series.value, np.bincount(day, reward) / np.bincount(day))
    np.testing.assert_allclose(series.noise, 1.0 / 200.0, rtol=0.15)
    assert np.mean(series.noise) == pytest.approx(1.0 / 200.0, rel=0.05)
    value, error = series.by_period(grid)
    np.testing.assert_allclose(value, reward.reshape(6, -1).mean(axis=1))
    np.testing.assert_allclose(error, 1400**-0.5, rtol=0.1)


def test_drift_is_found_at_the_stated_rate_where_there_is_none() -> None:
    """Also with shocks of whole days, in which rows are not independent."""
    rng, grid, logs = np.random.default_rng(6), grid_of(), 400
    for shock in (0.0, 3.0):
        value = rng.normal(size=(logs, 42)) * np.hypot(1.0, shock)
        found = sum(drift_p(grid, of_cells(one, 1.0)) < 0.05 for one in value)
        assert at_least(logs - found, logs, 0.95)
    trend = np.linspace(-1.5, 1.5, 42)
    found = sum(
        drift_p(grid, of_cells(one + trend, 1.0)) < 0.05 for one in rng.normal(size=(50, 42))
    )
    assert found > 45


def test_weekdays_are_no_drift() -> None:
    rng, grid = np.random.default_rng(7), grid_of(5250, 7.5)
    day = np.floor(grid.time * 52.5).astype(int) % 7
    season = 5.0 * (day >= 5)
    p = [drift_p(grid, of_cells(season + one, 1.0)) for one in rng.normal(size=(100, grid.cells))]
    assert np.mean(np.array(p) < 0.05) < 0.15
    found = predict(grid, of_cells(season, 1.0))
    ahead = (np.floor(52.5 + np.arange(7)).astype(int) % 7 >= 5).mean() * 5.0
    assert found.mean[0] == pytest.approx(ahead, abs=0.4)


def test_the_prediction_without_a_walk_is_that_of_least_squares() -> None:
    grid, rng = grid_of(), np.random.default_rng(8)
    value = rng.normal(size=42)
    found = predict(grid, of_cells(value, 1.0))
    design, ahead = grid.design, grid.future_design
    coefficients = np.linalg.lstsq(design, value, rcond=None)[0]
    assert found.mean[0] == pytest.approx(float(ahead @ coefficients))
    inverse = np.linalg.inv(design.T @ design)
    assert found.std_dev[0] == pytest.approx(float(np.sqrt(ahead @ inverse @ ahead)))
    assert found.quantile(0.025) < found.value < found.quantile(0.975)
    z = (found.quantile(0.9) - found.mean) / found.std_dev
    from scipy.stats import norm

    assert float(found.weight @ norm.cdf(z)) == pytest.approx(0.9)


def test_the_prediction_of_an_integrated_walk_is_its_conditional_mean() -> None:
    """Against a sum of a walk's small steps, with almost flat priors of the coefficients."""
    grid, value = grid_of(), np.random.default_rng(12).normal(size=42)
    steps, unit, rho = 4_000, 1.0 / 42.0, INTEGRATED_WALKS[0]
    end = 1.0 + 0.5 * grid.future_length
    time = np.append(grid.time, end)
    at = np.arange(steps) * (end / steps)
    # A step at u adds its size times the time that is left to the integral.
    reach = np.maximum(0.0, time[:, None] - at - 0.5 * end / steps) * (end / steps) ** 0.5
    design = np.vstack([grid.design, grid.future_design])
    covariance = 3.0 * rho**2 * unit * reach @ reach.T + 1e4 * design @ design.T
    inside = covariance[:-1, :-1] + np.eye(42)
    weight = np.linalg.solve(inside, covariance[:-1, -1])
    found, number = predict(grid, of_cells(value, 1.0)), 1 + len(RANDOM_WALKS)
    assert found.mean[number] == pytest.approx(float(weight @ value), rel=1e-3)
    left = covariance[-1, -1] - float(weight @ covariance[:-1, -1])
    assert found.std_dev[number] == pytest.approx(left**0.5, rel=1e-3)


@pytest.mark.parametrize(("kind", "least"), [("level", 0.95), ("trend", 0.95), ("walk", 0.88)])
def test_forecasts_cover_the_value_of_the_next_week(kind: str, least: float) -> None:
    rng, grid, logs, covered = np.random.default_rng(9), grid_of(), 200, 0
    for _ in range(logs):
        path = np.zeros(49)
        if kind == "trend":
            path = np.linspace(0.0, 5.0, 49)
        elif kind == "walk":
            path = np.cumsum(rng.normal(size=49)) * 16.0 / 42.0
        found = predict(grid, of_cells(path[:42] + rng.normal(size=42), 1.0))
        covered += found.quantile(0.025) <= path[42:].mean() <= found.quantile(0.975)
    assert at_least(covered, logs, least)


def test_a_walk_forgets_old_rows() -> None:
    rng, grid = np.random.default_rng(10), grid_of()
    level = of_cells(rng.normal(size=42), 1.0)
    assert predict(grid, level).half_life is None
    walk = of_cells(np.cumsum(rng.normal(size=42)) * 3.0, 1.0)
    found = predict(grid, walk).half_life
    assert found is not None and found < 0.1


def test_intervals_of_correlated_rows_cover() -> None:
    rng, grid, logs, hits = np.random.default_rng(11), grid_of(), 200, {"time": 0, "rows": 0}
    for _ in range(logs):
        shock = rng.normal(size=62)
        for i in range(1, 62):
            shock[i] = 0.6 * shock[i - 1] + 0.8 * shock[i]
        value = 2.0 * shock[20:] + rng.normal(size=42)
        half = 1.96 / np.sqrt(42.0)
        factor = widening(grid, of_cells(value, 1.0), 0.95)
        hits["rows"] += abs(value.mean()) <= half
        hits["time"] += abs(value.mean()) <= factor * half
    assert at_least(hits["time"], logs, 0.93) and hits["rows"] < 0.6 * logs


def test_adjusted_p_are_those_of_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])


def decaying(n: int, seed: int, start: float, end: float) -> dict[str, EvaluationRows]:
    """A policy that shows what half of the rows show, better by `start` at first, by `end` last."""
    rng = np.random.default_rng(seed)
    shown, time = rng.random(n) < 0.5, times(n)
    gain = start + (np.arange(n) / n) * (end - start)
    reward = (rng.random(n) < 0.4 + np.where(shown, gain, 0.0)).astype(float)
    rows = EvaluationRows(np.where(shown, 1.8, 0.2), reward, row=np.arange(n), time=time)
    return {"new": rows}


def test_a_gain_that_is_gone_is_no_go() -> None:
    rows = decaying(12_000, 1, 0.3, -0.1)
    before = evaluate_rows({"new": replace(rows["new"], time=None)}, reward_range=(0, 1))
    result = evaluate_rows(rows, reward_range=(0, 1))
    assert before.policies["new"].verdict.decision == "go"
    verdict = result.policies["new"].verdict
    assert verdict.decision == "not enough evidence"
    assert verdict.reasons[0].code == "drift" and "week 1" in verdict.reasons[0].message
    assert result.time is not None
    found = result.time.policies["new"].difference
    assert found.drifts and found.forecast is not None
    # Truth in the next week: .8 of the gain, which is -.133 / 2 in the mean of all rows.
    assert found.forecast.interval.low <= 0.4 * -0.133 <= found.forecast.interval.high
    said = result.time.sentences("new")
    assert "fell from" in said[1] and "an estimate for the next week is" in said[1]
    assert result.to_dict()["time"]["policies"]["new"]["difference"]["drifts"]


def test_a_steady_gain_is_go_and_shards_do_not_matter() -> None:
    rows = decaying(12_000, 2, 0.2, 0.2)
    result = evaluate_rows(rows, reward_range=(0, 1))
    assert result.policies["new"].verdict.decision == "go"
    assert result.time is not None
    said = result.time.sentences("new")
    value = result.time.policies["new"].value
    first, error = value.values[0], value.std_errors[0]
    assert len(said) == 1 and f"{first:.4g} ± {2.0 * error:.4g} in week 1 and" in said[0]
    assert said[0].startswith("no change")
    unknown = replace(value, std_errors=(np.nan,) * len(value.std_errors))
    assert "nan" not in result.time.change(unknown)
    widened = replace(result.time, correlated=True).sentences("new")
    assert "since evaluation.time.correlated is set" in widened[1]
    from offtower.evaluation.options import EvaluationOptions
    from offtower.evaluation.sums import EvaluationSums

    options = EvaluationOptions((IPS(),), (0.0, 1.0))
    index = np.random.default_rng(0).permutation(12_000)
    parts = [
        EvaluationSums.of({"new": rows["new"].take(part)}, options)
        for part in np.array_split(index, 5)
    ]
    whole = EvaluationSums.of(rows, options).finish().time
    merged = parts[2].merge(parts[0]).merge(parts[4].merge(parts[1])).merge(parts[3]).finish().time
    assert whole is not None and merged is not None and whole.periods == merged.periods
    np.testing.assert_allclose(merged.policies["new"].value.p, whole.policies["new"].value.p)


def test_propensities_that_go_wrong_are_found() -> None:
    rows = decaying(12_000, 3, 0.2, 0.2)["new"]
    wrong = np.where(np.arange(12_000) < 6000, 0.92, 1.08)  # Right on average.
    rows = replace(rows, importance_weight=rows.importance_weight * wrong)
    verdict = evaluate_rows({"new": rows}, reward_range=(0, 1)).policies["new"].verdict
    assert verdict.decision == "not enough evidence"
    assert "mean weight of new rose" in " ".join(r.message for r in verdict.reasons)


class _OneColumn(Log):
    def __init__(self, column: pa.Array) -> None:
        from offtower.data.schema import LogSchema

        self.schema, self.column = LogSchema(timestamp="t"), column

    def read_row_group(self, index: int, columns: object = None) -> pa.Table:
        return pa.table({"t": self.column})

    def location(self, index: int) -> object:  # type: ignore[override]
        raise NotImplementedError


@pytest.mark.parametrize("unit", [10**6, 10**3, 1])
def test_numbers_since_1970_are_times(unit: int) -> None:
    second = MONDAY // unit
    clock = LogClock.of(_OneColumn(pa.array([second, second + 1])))
    assert clock is not None
    assert clock.time(np.array([second]))[0] == MONDAY  # type: ignore[index]
    assert LogClock.of(_OneColumn(pa.array([second, None]))) == clock
    for others in ([3, 4], [None], ["2026-01-05"]):
        plain = LogClock.of(_OneColumn(pa.array(others)))
        assert plain is not None and plain.time(np.array([3]))[0] == 3  # type: ignore[index]


def test_simulated_drift_has_the_stated_values_by_week() -> None:
    from offtower.data.simulate import (
        LoggingPolicy,
        SimulatedWorld,
        WorldSettings,
        logging_value_of_week,
        parse_drift,
    )

    drift = parse_drift(["trend=2", "week=-1", "logging=-2"])
    settings = WorldSettings(4, 4, 4, drift=drift)
    world = SimulatedWorld(30, settings, seed=4, logging=LoggingPolicy(beta=0.7))
    table = pa.concat_tables(world.log(12_000, seed=1))
    reward = table.column("reward").to_numpy()
    time = table.column("timestamp").to_numpy().astype("datetime64[us]")
    week = (time - time.min()).astype(np.int64) // WEEK
    truth = [logging_value_of_week(world, i) for i in range(7)]
    found = np.bincount(week, reward, minlength=6)[:6] / np.bincount(week, minlength=6)[:6]
    # A week has 2,000 rows; 200 contexts make the truth uncertain by about .01.
    np.testing.assert_allclose(found, truth[:6], atol=0.045)
    assert max(truth) - min(truth) > 0.1
    inverse = 1.0 / table.column("pscore").to_numpy()
    for half in (week < 3, week >= 3):
        error = inverse[half].std() / np.sqrt(half.sum())
        assert abs(inverse[half].mean() - 30.0) < 4.5 * error
    with pytest.raises(ConfigError, match=r"trend, step, week, logging"):
        parse_drift(["trend=1", "trend=2"])


def test_times_of_arrays_are_microseconds() -> None:
    from offtower.learner.evaluation import microseconds

    dates = np.array(["2026-01-05", "2026-01-06"], dtype="datetime64[D]")
    assert microseconds(dates).tolist() == [MONDAY, MONDAY + DAY]
    assert microseconds([3, 4]).tolist() == [3, 4]
    with pytest.raises(DataError, match="missing values"):
        microseconds(np.array(["2026-01-05", "NaT"], dtype="datetime64[D]"))
    with pytest.raises(DataError, match="float64"):
        microseconds([0.5])
