"""Coverage of forecasts, rates of the test for drift, and intervals of correlated rows.

    python benchmarks/drift_coverage.py [--logs 300]

Six weeks of days: a value by day moves as the kind says, and rows add noise of standard deviation 1
to a day. Sizes are in standard errors of the mean of all days. "before": the normal interval of
that mean, against the mean of the next seven days.
"""

from __future__ import annotations

import argparse

import numpy as np

from offtower.config import TimeOptions
from offtower.evaluation.drift import TimeGrid
from offtower.evaluation.drift.forecast import predict
from offtower.evaluation.drift.hypotheses import drift_p, serial_correlation
from offtower.evaluation.drift.serial import FOUND, widening
from offtower.evaluation.drift.series import Series
from offtower.evaluation.intervals.time_sums import DAY, TimeSums

DAYS, AHEAD = 42, 7
MONDAY = 1_767_571_200_000_000
UNIT = DAYS**-0.5
KINDS = (
    "level",
    "trend 2",
    "trend 5",
    "trend 20",
    "walk 2",
    "walk 4",
    "walk 8",
    "walk 30",
    "step 10 after 30 %",
    "step 10 after 60 %",
    "step 10 after 90 %",
    "bend 10",
    "weekends 5",
    "shocks",
)


def path(kind: str, rng: np.random.Generator) -> np.ndarray:
    """(DAYS + AHEAD,) values by day."""
    name, *rest = kind.split()
    size = float(rest[0]) * UNIT if rest else 0.0
    time = (np.arange(DAYS + AHEAD) + 0.5) / DAYS
    if name == "trend":
        return size * time
    if name == "walk":
        return np.cumsum(rng.normal(size=time.size)) * size * UNIT
    if name == "step":
        return size * (time > float(rest[2]) / 100.0)
    if name == "bend":
        return size * np.maximum(0.0, 2.0 * time - 1.0)
    if name == "weekends":
        return size * (np.arange(time.size) % 7 >= 5)
    return 2.0 * rng.normal(size=time.size) if name == "shocks" else np.zeros(time.size)


def grid() -> TimeGrid:
    """Six weeks of days from a Monday on."""
    time = MONDAY + np.arange(24 * DAYS) * (DAY // 24)
    sums = TimeSums.of(time, np.arange(time.size), np.ones((time.size, 1)))
    return TimeGrid.of(sums, TimeOptions())


def series(value: np.ndarray) -> Series:
    return Series(value, np.ones(DAYS), np.ones(DAYS), 400.0)


def forecasts(logs: int) -> None:
    print("| values | before | forecast | width | drift found |\n|---|---|---|---|---|")
    at = grid()
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng([7, number])
        before, covered, width, found = 0, 0, [], 0
        for _ in range(logs):
            values = path(kind, rng)
            one = series(values[:DAYS] + rng.normal(size=DAYS))
            truth = float(values[DAYS:].mean())
            before += abs(float(one.value.mean()) - truth) <= 1.96 * UNIT
            predicted = predict(at, one)
            low, high = predicted.quantile(0.025), predicted.quantile(0.975)
            covered += low <= truth <= high
            width.append((high - low) / (2.0 * 1.96 * UNIT))
            found += drift_p(at, one) < 0.05
        rates = [before / logs, covered / logs, float(np.median(width)), found / logs]
        print(f"| {kind} | " + " | ".join(f"{rate:.3f}" for rate in rates) + " |", flush=True)


def correlated(logs: int) -> None:
    print(
        "\n| correlation | shocks | before | by time | default | found |\n|---|---|---|---|---|---|"
    )
    at = grid()
    for number, (rho, size) in enumerate([(0, 0), (0, 2), (0.3, 2), (0.6, 2), (0.8, 2)]):
        rng = np.random.default_rng([8, number])
        before, by_time, default, found = 0, 0, 0, 0
        for _ in range(logs):
            shock = rng.normal(size=DAYS + 50)
            for i in range(1, shock.size):
                shock[i] = rho * shock[i - 1] + (1.0 - rho**2) ** 0.5 * shock[i]
            one = series(size * shock[50:] + rng.normal(size=DAYS))
            off = abs(float(one.value.mean())) / (1.96 * UNIT)
            test = serial_correlation(at, one)
            factor = widening(at, one, 0.95)
            hit = test is not None and test.p < FOUND
            before += off <= 1.0
            by_time += off <= factor
            default += off <= (factor if hit else 1.0)
            found += hit
        rates = [before / logs, by_time / logs, default / logs, found / logs]
        print(
            f"| {rho} | {size} | " + " | ".join(f"{rate:.3f}" for rate in rates) + " |", flush=True
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logs", type=int, default=300)
    given = parser.parse_args().logs
    forecasts(given)
    correlated(2 * given)
