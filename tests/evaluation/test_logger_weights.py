"""Logs of several behavior policies: optimal weights per logger, and balanced weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offtower.errors import OfftowerError
from offtower.evaluation import EvaluationRows, evaluate_rows
from offtower.evaluation import estimators as e
from offtower.evaluation.intervals.statistics import finish

TARGET = np.array([0.1, 0.2, 0.7])
LOGGERS = np.array([[0.1, 0.25, 0.65], [0.5, 0.47, 0.03]])
"""One close to the target, one far from it."""
REWARD = np.array([0.2, 0.4, 0.5])
MODEL = np.array([0.3, 0.3, 0.45])
VALUE = float(TARGET @ REWARD)


def sample(counts: tuple[int, ...], rng: np.random.Generator) -> tuple[EvaluationRows, np.ndarray]:
    """Rows with each logger's own propensities, and the logged actions."""
    logger = np.repeat(np.arange(len(counts)), counts)
    edges = LOGGERS.cumsum(axis=1)
    action = (edges[logger] > rng.random((logger.size, 1))).argmax(axis=1)
    reward = (rng.random(logger.size) < REWARD[action]) * 1.0
    weight = TARGET[action] / LOGGERS[logger, action]
    n = logger.size
    rows = EvaluationRows(
        weight, reward, MODEL[action], np.full(n, float(TARGET @ MODEL)), row=np.arange(n)
    )
    return replace(rows, logger=logger), action


def row_variance(logger: int) -> float:
    """Of an IPS term."""
    weight = TARGET / LOGGERS[logger]
    return float(LOGGERS[logger] @ (weight**2 * REWARD) - VALUE**2)


def test_weights_approach_those_of_least_variance() -> None:
    """With 100,000 rows estimated variances are within 5 % (4.5 standard errors) of the true."""
    counts = (30_000, 70_000)
    rows, _ = sample(counts, np.random.default_rng(5))
    found = e.LoggerWeightedIPS(2).estimate(rows)
    precision = [n / row_variance(i) for i, n in enumerate(counts)]
    assert found.std_error == pytest.approx(sum(precision) ** -0.5, rel=0.05)
    naive = e.IPS().estimate(rows)
    assert found.std_error < 0.5 * naive.std_error
    assert abs(found.value - VALUE) < 4.5 * found.std_error


def test_each_half_has_the_weights_of_the_other() -> None:
    rows, _ = sample((40, 60), np.random.default_rng(2))
    assert rows.logger is not None
    estimator = e.LoggerWeightedIPS(2)
    cell = estimator.terms(rows)[:, 0::2].argmax(axis=1)  # half * 2 + logger
    term = rows.importance_weight * rows.reward
    groups = [term[cell == i] for i in range(4)]
    value = 0.0
    for half in (0, 1):
        own, other = groups[2 * half : 2 * half + 2], groups[2 - 2 * half : 4 - 2 * half]
        squares = [float(((g - g.mean()) ** 2).sum()) for g in other]
        counts = [g.size for g in other]
        pooled = sum(squares) / sum(counts)
        precision = [
            n / ((s + 10.0 * pooled) / (n + 10.0)) for n, s in zip(counts, squares, strict=True)
        ]
        mean = sum(p * g.mean() for p, g in zip(precision, own, strict=True)) / sum(precision)
        value += sum(g.size for g in own) / rows.n * mean
    assert estimator.estimate(rows).value == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("kind", [e.LoggerWeightedIPS, e.LoggerWeightedDR])
def test_values_are_unbiased_and_errors_at_most_the_plain_ones(kind: type[e.Estimator]) -> None:
    """1,000 logs; 4.4 standard errors: fails by chance in 1 of 1e5 seeds."""
    rng, estimator = np.random.default_rng(7), kind(loggers=2)
    plain = e.IPS() if kind is e.LoggerWeightedIPS else e.DR()
    found = []
    for _ in range(1_000):
        rows, _ = sample((120, 280), rng)
        one, other = estimator.estimate(rows), plain.estimate(rows)
        found.append((one.value, one.std_error, other.value, other.std_error))
    value, error, plain_value, plain_error = np.array(found).T
    assert abs(value.mean() - VALUE) < 4.4 * value.std() / np.sqrt(1_000)
    assert value.std() < 0.75 * plain_value.std() and error.mean() < 0.75 * plain_error.mean()
    assert (error**2).mean() == pytest.approx(value.var(), rel=0.25)


def test_one_logger_gives_the_plain_mean() -> None:
    rows, _ = sample((300,), np.random.default_rng(3))
    found, plain = e.LoggerWeightedIPS(1).estimate(rows), e.IPS().estimate(rows)
    assert found.value == pytest.approx(plain.value, rel=1e-12)
    assert found.std_error == pytest.approx(plain.std_error, rel=0.02)  # spread around both halves


def test_rows_of_a_user_are_in_one_half_and_shards_merge() -> None:
    rng = np.random.default_rng(8)
    rows, _ = sample((500, 500), rng)
    rows = replace(rows, user=rng.integers(0, 60, rows.n))
    estimator = e.LoggerWeightedDR(2)
    half = estimator.terms(rows)[:, [0, 2]].sum(axis=1)
    assert rows.user is not None
    assert all(np.ptp(half[rows.user == user]) == 0.0 for user in range(60))
    assert 0.2 < half.mean() < 0.8
    parts = [estimator.statistics(rows.take(slice(i, i + 250)), by_user=True) for i in (0, 250)]
    parts += [estimator.statistics(rows.take(slice(i, i + 250)), by_user=True) for i in (500, 750)]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    whole = estimator.finish(estimator.statistics(rows, by_user=True))
    assert estimator.finish(merged).value == pytest.approx(whole.value, rel=1e-12)
    assert estimator.finish(merged).std_error == pytest.approx(whole.std_error, rel=1e-9)


def test_verdicts_and_intervals_of_a_log_of_two_loggers() -> None:
    rows, _ = sample((1_000, 2_000), np.random.default_rng(9))
    names = ["ips", "logger_weighted_ips"]
    result = evaluate_rows(
        {"new": rows}, names, reward_range=(0, 1), decide_by="logger_weighted_ips"
    )
    plain, found = (result.policies["new"].estimates[name] for name in names)
    assert found.difference is not None and plain.difference is not None
    difference = e.Difference(e.LoggerWeightedIPS(2), e.MeanReward())
    alone = finish(difference, difference.statistics(rows, rows))
    assert found.difference.estimate.value == pytest.approx(alone.value, rel=1e-9)
    assert found.difference.estimate.std_error < 0.7 * plain.difference.estimate.std_error
    for interval in found.intervals.values():
        assert interval.low < found.estimate.value < interval.high


def test_balanced_weights_have_the_least_variance_of_all() -> None:
    """Variances by enumeration of loggers, actions and rewards."""
    share = np.array([0.3, 0.7])
    balanced = e.balanced_weight(TARGET, LOGGERS.T, share)
    mixture = share @ LOGGERS
    assert mixture @ (balanced * REWARD) == pytest.approx(VALUE, rel=1e-12)
    variance = float(mixture @ (balanced**2 * REWARD) - VALUE**2)
    plain = float(share @ [row_variance(0), row_variance(1)])
    weighted = 1.0 / float(np.sum(share / np.array([row_variance(0), row_variance(1)])))
    assert variance < plain and weighted < plain
    with pytest.raises(OfftowerError, match="row 1 logged an item"):
        e.balanced_weight(np.array([0.5, 0.5]), np.array([[0.2, 0.1], [0.0, 0.0]]), share)


def test_rows_without_their_logger_are_refused() -> None:
    rows, _ = sample((30, 30), np.random.default_rng(1))
    with pytest.raises(OfftowerError, match="behavior_policy"):
        e.LoggerWeightedIPS(2).estimate(replace(rows, logger=None))
    with pytest.raises(OfftowerError, match="reaches from 0 to 1"):
        e.LoggerWeightedIPS(1).estimate(rows)
    with pytest.raises(OfftowerError, match="1 to 16 behavior policies"):
        e.LoggerWeightedIPS(17)
