"""Intervals: their formulas, what they refuse, and how often they cover."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offtower.errors import OfftowerError
from offtower.evaluation import EvaluationRows
from offtower.evaluation import estimators as e
from offtower.evaluation.intervals import (
    bootstrap_interval,
    normal_interval,
    simultaneous_confidence,
)
from offtower.evaluation.intervals.smoothing_bound import GRID, SmoothingSums

from .one_context import OneContext
from .test_estimators import some_rows

LOGS = 400
SLACK = 3.0 * math.sqrt(0.95 * 0.05 / LOGS)
"""Three standard deviations of a coverage measured on 400 logs: 3.3 points. A method that covers
with exactly 95 % fails each of its two checks in 0.3 % of seeds."""


def check_coverage(hits: float, conservative: bool = False) -> None:
    coverage = hits / LOGS
    assert coverage >= 0.95 - SLACK, coverage
    assert conservative or coverage <= 0.95 + SLACK, coverage


def test_normal_interval_by_hand() -> None:
    rows = some_rows(9)
    got = e.IPS().interval(rows, confidence=0.9)
    product = rows.importance_weight * rows.reward
    half = 1.8595480375308984 * product.std(ddof=1) / 3.0  # t, 8 degrees, 95 %
    assert (got.low, got.high) == pytest.approx((product.mean() - half, product.mean() + half))
    assert got.to_dict() == {
        "low": got.low,
        "high": got.high,
        "confidence": 0.9,
        "method": "normal",
        "by_user": False,
    }


def test_bernstein_by_hand() -> None:
    rows = some_rows(200)
    got = e.ClippedIPS(max_weight=2.0).interval(rows, method="bernstein", reward_range=(0.0, 1.0))
    x = np.minimum(rows.importance_weight, 2.0) * rows.reward / 2.0
    log_term = math.log(2 / 0.025)
    half = math.sqrt(2 * x.var(ddof=1) * log_term / 200) + 7 * log_term / (3 * 199)
    assert got.low == pytest.approx(max(0.0, 2.0 * (x.mean() - half)))
    assert got.high == pytest.approx(min(2.0, 2.0 * (x.mean() + half)))


BOUNDED = [
    e.IPS(),
    e.ClippedIPS(max_weight=2.0),
    e.SubGaussianIPS(lambda_=0.3),
    e.LogSmoothing(lambda_=0.3),
    e.DM(),
    e.DR(),
    e.ClippedDR(max_weight=2.0),
    e.SwitchDR(threshold=2.0),
    e.DRos(shrinkage=2.0),
    e.SubGaussianDR(lambda_=0.3),
]


@pytest.mark.parametrize("estimator", BOUNDED, ids=lambda x: x.label)
@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_no_term_leaves_the_bounds(estimator: e.Estimator, seed: int) -> None:
    """Random weights up to the largest, rewards and predictions anywhere in their range."""
    rng = np.random.default_rng(seed)
    top = float(rng.uniform(0.5, 9.0))
    low = 0.0 if estimator.label == "log_smoothing" else float(rng.normal())
    high = low + float(rng.uniform(0.1, 3.0))
    edge = np.array([0.0, 0.5, 1.0])[rng.integers(0, 3, (3, 40))]
    r, q, m = low + (high - low) * edge
    weight = top * np.array([0.0, 0.1, 0.5, 1.0])[rng.integers(0, 4, 40)]
    terms = estimator.terms(EvaluationRows(weight, r, q, m))
    least, largest = estimator.bounds((low, high), top)
    assert terms.min() >= least - 1e-9 and terms.max() <= largest + 1e-9


@pytest.mark.parametrize(
    "estimator", [BOUNDED[i] for i in (1, 2, 4, 6, 7, 8, 9)], ids=lambda x: x.label
)
def test_bounded_weights_need_no_largest_weight(estimator: e.Estimator) -> None:
    free = estimator.bounds((0.0, 1.0), None)
    capped = estimator.bounds((0.0, 1.0), 1e6)
    assert free[0] <= capped[0] and free[1] >= capped[1]


@pytest.mark.parametrize(
    ("estimator", "options", "message"),
    [
        (e.IPS(), {"method": "magic"}, "unknown interval method 'magic'"),
        (e.IPS(), {"confidence": 1.0}, "confidence must lie between 0 and 1"),
        (e.IPS(), {"method": "bernstein"}, "needs reward_range"),
        (
            e.IPS(),
            {"method": "bernstein", "reward_range": (0, 1)},
            "ips needs max_weight, the largest weight that can occur",
        ),
        (
            e.IPS(),
            {"method": "bernstein", "reward_range": (0, 1), "max_weight": 0.5},
            "outside of what reward_range and max_weight allow",
        ),
        (e.SNIPS(), {"method": "bernstein", "reward_range": (0, 1)}, "not a mean of bounded"),
        (e.IPS(), {"method": "log_smoothing"}, r"needs reward_range=\(low, high\)"),
        (
            e.DR(),
            {"method": "log_smoothing", "reward_range": (0, 1)},
            "ask IPS or LogSmoothing for it",
        ),
        (
            e.IPS(),
            {"method": "log_smoothing", "reward_range": (0.5, 1)},
            r"outside of the reward range \[0.5, 1\]",
        ),
        (e.IPS(), {"method": "log_smoothing", "reward_range": (1, 0)}, "low < high"),
        (e.IPS(), {"method": "betting", "reward_range": (0.5, 1)}, "outside of the reward range"),
        (
            e.ClippedIPS(max_weight=1.0),
            {"method": "bernstein", "reward_range": (0, 1), "by_user": True},
            "no form by user",
        ),
        (e.IPS(), {"method": "bootstrap", "replicates": 100}, "use at least 200"),
    ],
)
def test_what_intervals_refuse(
    estimator: e.Estimator, options: dict[str, object], message: str
) -> None:
    with pytest.raises(OfftowerError, match=message):
        estimator.interval(some_rows(), **options)  # type: ignore[arg-type]


def test_by_user_needs_users() -> None:
    rows = some_rows()
    bare = EvaluationRows(rows.importance_weight, rows.reward)
    with pytest.raises(OfftowerError, match="needs the 'user' column"):
        e.IPS().interval(bare, by_user=True)
    one = EvaluationRows(rows.importance_weight, rows.reward, user=np.zeros(50, np.int64))
    with pytest.raises(OfftowerError, match="at least two users; the rows have one"):
        e.IPS().interval(one, by_user=True)
    with pytest.raises(OfftowerError, match="carry no bootstrap replicates"):
        bootstrap_interval(e.IPS(), e.IPS().statistics(rows))


def test_bonferroni() -> None:
    assert simultaneous_confidence(0.95, 1) == pytest.approx(0.95)
    assert simultaneous_confidence(0.95, 10) == pytest.approx(0.995)


# --- the logarithmic-smoothing bound


def test_smoothing_bound_solves_its_equation_and_merges() -> None:
    rows = some_rows(300)
    sums = SmoothingSums.of(rows, (0.0, 1.0))
    bound = sums.lower_bound("value_low", 0.05)
    z = rows.importance_weight * rows.reward
    logs = np.array([np.sum(np.log1p(g * z) - np.log1p(g * bound)) for g in GRID])
    assert np.mean(np.exp(logs)) == pytest.approx(1 / 0.05, rel=1e-8)
    parts = [SmoothingSums.of(rows.take(slice(i, i + 50)), (0.0, 1.0)) for i in range(0, 300, 50)]
    merged = reduce(SmoothingSums.merge, parts[::-1])
    assert merged.lower_bound("value_low", 0.05) == pytest.approx(bound, rel=1e-10)


def test_smoothing_bound_is_at_least_the_published_one() -> None:
    """Averaging over the grid costs at most log(grid) / n against the best lambda in it."""
    rows = some_rows(2000)
    got = SmoothingSums.of(rows, (0.0, 1.0)).lower_bound("value_low", 0.05)
    z = rows.importance_weight * rows.reward
    published = [
        (math.exp(np.mean(np.log1p(g * z)) - math.log(GRID.size / 0.05) / z.size) - 1) / g
        for g in GRID
    ]
    assert got >= max(published) - 1e-12
    assert got <= z.mean()


def test_smoothing_bound_respects_shift_and_scale_of_rewards() -> None:
    rows = some_rows(500)
    first = SmoothingSums.of(rows, (0.0, 1.0))
    moved = EvaluationRows(rows.importance_weight, 3.0 * rows.reward - 7.0)
    second = SmoothingSums.of(moved, (-7.0, -4.0))
    for a, b, shift in [
        (first.value(), second.value(), -7.0),
        (first.difference(), second.difference(), 0.0),
    ]:
        assert b.low == pytest.approx(3.0 * a.low + shift, rel=1e-9)
        assert b.high == pytest.approx(3.0 * a.high + shift, rel=1e-9)
    assert -1.0 <= first.difference().low <= first.difference().high <= 1.0


def test_smoothing_bound_without_information_is_the_range() -> None:
    rows = EvaluationRows([0.0, 0.0], [1.0, 0.0])
    interval = SmoothingSums.of(rows, (0.0, 1.0)).value()
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_a_large_weight_moves_the_guaranteed_bound_little() -> None:
    """One weight of 100 in 1,000 rows adds 0.1 to IPS, and 0.02 at most to the bound."""
    rows = some_rows(1000)
    weight, reward = rows.importance_weight.copy(), rows.reward.copy()
    reward[0], weight[0] = 1.0, 1.0
    before = SmoothingSums.of(EvaluationRows(weight, reward), (0.0, 1.0)).value()
    weight[0] = 100.0
    after = SmoothingSums.of(EvaluationRows(weight, reward), (0.0, 1.0)).value()
    assert 0.0 <= after.low - before.low < 0.02


def test_impossible_weights_are_found_out() -> None:
    rows = some_rows(1000)
    sums = SmoothingSums.of(EvaluationRows(rows.importance_weight * 50, rows.reward), (0.0, 1.0))
    assert sums.mean_weight() > 1.0
    interval = sums.value()
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_a_betting_limit_is_where_the_capital_reaches_its_bound() -> None:
    rng = np.random.default_rng(5)
    weight, reward = rng.exponential(size=40), rng.random(40)
    found = e.IPS().interval(
        EvaluationRows(weight, 2.0 * reward - 1.0), 0.9, method="betting", reward_range=(-1.0, 1.0)
    )
    for end, z in (
        ((found.low + 1.0) / 2.0, weight * reward),
        ((1.0 - found.high) / 2.0, weight * (1.0 - reward)),
    ):
        capital, best, mean, variance = 1.0, 0.0, 0.5, 0.25
        square = 0.25
        for i, term in enumerate(z):
            bet = min(np.sqrt(2.0 * np.log(20.0) / (len(z) * variance)), 0.75 / end)
            capital *= 1.0 + bet * (term - end)
            best = max(best, capital)
            mean = (0.5 + z[: i + 1].sum()) / (i + 2.0)
            square += (term - mean) ** 2
            variance = square / (i + 2.0)
        assert best == pytest.approx(20.0, rel=1e-6)
    assert found.low < float(np.mean(weight * (2.0 * reward - 1.0))) < found.high
    for method in ("log_smoothing", "betting"):
        with pytest.raises(OfftowerError, match="there are no rows to estimate from"):
            e.IPS().interval(
                EvaluationRows(weight[:0], reward[:0]), method=method, reward_range=(0, 1)
            )


# --- coverage, on 400 logs each


def test_coverage_of_values() -> None:
    """One context, 10 items, 1,000 rows: normal, bootstrap, Bernstein, logarithmic smoothing."""
    world, rng = OneContext(10), np.random.default_rng(11)
    top = float(world.weight.max())
    plain = {"ips": e.IPS(), "snips": e.SNIPS(), "dr": e.DR(), "sndr": e.SNDR()}
    hits = dict.fromkeys(
        [*plain, "bootstrap", "bernstein", "log_smoothing", "betting", "difference"], 0
    )
    width = dict.fromkeys(["log_smoothing", "betting"], 0.0)
    pair = e.Difference(e.DR(), e.MeanReward())
    gain = world.value - world.logging_value
    for _ in range(LOGS):
        rows = world.sample(1000, rng)
        for name, estimator in plain.items():
            interval = estimator.interval(rows)
            hits[name] += interval.low <= world.value <= interval.high
        options = {"reward_range": (0.0, 1.0), "max_weight": top}
        for method in ("bernstein", "log_smoothing", "betting"):
            interval = e.IPS().interval(rows, method=method, **options)  # type: ignore[arg-type]
            hits[method] += interval.low <= world.value <= interval.high
            if method in width:
                width[method] += interval.high - interval.low
        interval = e.SNIPS().interval(rows, method="bootstrap", replicates=300)
        hits["bootstrap"] += interval.low <= world.value <= interval.high
        interval = normal_interval(pair, pair.statistics(rows, rows))
        hits["difference"] += interval.low <= gain <= interval.high
    print(hits)
    for name, count in hits.items():
        check_coverage(count, conservative=name in ("bernstein", "log_smoothing", "betting"))
    assert width["betting"] < width["log_smoothing"]


def test_coverage_by_user() -> None:
    """250 users of 8 rows with a taste of their own: by row misses, by user covers."""
    world, rng = OneContext(10), np.random.default_rng(12)
    users = np.repeat(np.arange(250), 8)
    hits = dict.fromkeys(["row", "user", "bootstrap"], 0)
    for _ in range(LOGS):
        rows = world.sample(2000, rng)
        taste = np.repeat(rng.integers(0, 2, 250), 8)
        # Half of the users are always pleased, the others never: E r = 1/2 whatever is shown.
        rows = EvaluationRows(rows.importance_weight, taste * 1.0, user=users)
        for name, options in {
            "row": {},
            "user": {"by_user": True},
            "bootstrap": {"by_user": True, "method": "bootstrap", "replicates": 300},
        }.items():
            interval = e.SNIPS().interval(rows, **options)  # type: ignore[arg-type]
            hits[name] += interval.low <= 0.5 <= interval.high
    print(hits)
    assert hits["row"] / LOGS < 0.88
    check_coverage(hits["user"])
    check_coverage(hits["bootstrap"])


def heavy_tail_hits(logs: int) -> dict[str, int]:
    """Pareto weights of infinite variance (shape 1.5, mean 1), rewards Bernoulli(1/2): V = 1/2."""
    rng = np.random.default_rng(13)
    hits = dict.fromkeys(["normal", "log_smoothing", "difference"], 0)
    for _ in range(logs):
        weight = (1.0 + rng.pareto(1.5, 1000)) / 3.0
        rows = EvaluationRows(weight, (rng.random(1000) < 0.5) * 1.0)
        interval = e.IPS().interval(rows)
        hits["normal"] += interval.low <= 0.5 <= interval.high
        sums = SmoothingSums.of(rows, (0.0, 1.0))
        interval = sums.value()
        hits["log_smoothing"] += interval.low <= 0.5 <= interval.high
        interval = sums.difference()
        hits["difference"] += interval.low <= 0.0 <= interval.high
    return hits


def test_heavy_tails_break_the_normal_interval_and_not_the_guaranteed_one() -> None:
    hits = heavy_tail_hits(LOGS)
    print(hits)
    assert hits["normal"] / LOGS < 0.95 - SLACK
    check_coverage(hits["log_smoothing"], conservative=True)
    check_coverage(hits["difference"], conservative=True)


@pytest.mark.slow
@pytest.mark.parametrize("items", [10, 1000])
def test_coverage_of_every_estimator(items: int) -> None:
    """5,000 rows; each interval against its estimator's own limit, 95 % +- 3.3 points."""
    from .test_closed_form import ALL as EVERY
    from .test_closed_form import exact

    world, rng = OneContext(items), np.random.default_rng(14)
    kinds = [x for x in EVERY if x.label != "dm"]
    normal = dict.fromkeys([x.label for x in kinds], 0)
    bootstrap = dict.fromkeys([x.label for x in kinds], 0)
    for _ in range(LOGS):
        rows = world.sample(5000, rng)
        for estimator in kinds:
            truth = exact(world, estimator)[0]
            interval = estimator.interval(rows)
            normal[estimator.label] += interval.low <= truth <= interval.high
            interval = estimator.interval(rows, method="bootstrap", replicates=200)
            bootstrap[estimator.label] += interval.low <= truth <= interval.high
    print(normal, bootstrap)
    for count in [*normal.values(), *bootstrap.values()]:
        check_coverage(count)


def test_the_smoothing_interval_holds_at_every_time_of_a_growing_log() -> None:
    """Read after each of 20 batches, as rows arrive, a lower bound at .05 exceeds the truth in at
    most .05 of 200 logs (Ville's inequality); 24 or more have probability 7e-5 at .05."""
    wrong, logs, batch = 0, 200, 40
    for seed in range(logs):
        rng = np.random.default_rng(seed)
        sums = None
        for _ in range(20):
            weight = rng.choice([0.2, 3.4], size=batch, p=[0.75, 0.25])
            rows = EvaluationRows(weight, (rng.random(batch) < 0.3).astype(float))
            one = SmoothingSums.of(rows, (0.0, 1.0))
            sums = one if sums is None else sums.merge(one)
            if sums.lower_bound("value_low", 0.05) > 0.3:
                wrong += 1
                break
    assert wrong < 24
