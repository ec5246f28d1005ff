"""Coverage of forecasts, rates of the test for drift, and intervals of correlated rows.

    python benchmarks/drift_coverage.py [--logs 300] [--kinds chosen|other|fresh]

Some weeks of days, six unless the kind says otherwise: a value by day moves as the kind says, and
rows add noise of standard deviation 1 to a day. Sizes are in standard errors of the mean of all
days. "mean": the normal interval of that mean, against the mean of the next seven days. "trend":
least squares of a linear trend and weekdays with its t interval. "blocks": the same with moving
blocks of seven days' residuals (Kuensch 1989). "late change": a test finds a step or a bend in the
last fifth; coverage of the forecast where it does, and where it does not. On whole weeks, "mean"
and "trend" are the OPFV estimates (Shimizu et al. 2025) with weekdays as time features and a
regression without and with time. Prior weights of forecasts were chosen on the first kinds and,
after the coverage of a late bend and a slow cycle was known, on those of "other"; the kinds of
"fresh" are held out.
"""

from __future__ import annotations

import argparse
import math
from functools import cache

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from offtower.config import TimeOptions
from offtower.evaluation.drift import TimeGrid
from offtower.evaluation.drift.forecast import predict
from offtower.evaluation.drift.hypotheses import drift_p, serial_correlation
from offtower.evaluation.drift.serial import FOUND, widening
from offtower.evaluation.drift.series import Fit, Series
from offtower.evaluation.intervals.time_sums import DAY, TimeSums

DAYS, AHEAD = 42, 7
MONDAY = 1_767_571_200_000_000
UNIT = 1.0 / math.sqrt(DAYS)
CHOSEN = (
    "level",
    "trend 2",
    "trend 5",
    "trend 20",
    "walk 2",
    "walk 4",
    "walk 8",
    "walk 15",
    "walk 30",
    "step 10 after 30 %",
    "step 10 after 60 %",
    "step 10 after 90 %",
    "bend 10",
    "weekends 5",
    "shocks",
)
OTHER = (
    "novelty 15",
    "saturation 15",
    "cycle 5",
    "reversion 5",
    "two steps 10",
    "heavy walk 8",
    "smooth walk 10",
    "late bend 20",
    "fading weekends 10",
    "trend 5 with shocks",
    "walk 8 of 28 days",
    "walk 8 of 91 days",
    "bend 10 of 28 days",
    "step 10 after 90 % of 91 days",
)
FRESH = (
    "bend 15 after 70 %",
    "bend 15 after 90 %",
    "bend 15 after 80 % of 91 days",
    "wave 8",
    "half cycle 8",
    "quadratic 10",
    "logistic 12",
    "plateau 15",
    "step 8 after 80 %",
    "step 15 after 95 %",
    "walk 20",
    "walk 8 of 56 days",
    "smooth walk 30",
)


def days_of(kind: str) -> int:
    words = kind.split()
    return int(words[-2]) if words[-1] == "days" else DAYS


def path(kind: str, rng: np.random.Generator) -> np.ndarray:
    """(days + AHEAD,) values by day."""
    days, words = days_of(kind), kind.split()
    unit = 1.0 / math.sqrt(days)
    size = unit * next((float(word) for word in words if word.isdigit()), 0.0)
    time = (np.arange(days + AHEAD) + 0.5) / days
    shocks = 2.0 * rng.normal(size=time.size) if words[-1] == "shocks" else np.zeros(time.size)
    weekend = np.arange(time.size) % 7 >= 5
    steps: np.ndarray = rng.normal(size=time.size) * unit
    if kind.startswith("trend"):
        return size * time + shocks
    if kind.startswith("walk"):
        return size * np.cumsum(steps)
    if kind.startswith("step"):
        return size * (time > float(words[3]) / 100.0)
    if kind.startswith("bend") and "after" in words:
        start = float(words[3]) / 100.0
        return size * np.maximum(0.0, (time - start) / (1.0 - start))
    if kind.startswith("wave"):
        return size * np.sin(2.0 * np.pi * (time / 0.8 + rng.random()))
    if kind.startswith("half cycle"):
        return size * np.sin(2.0 * np.pi * (time / 3.0 + rng.random()))
    if kind.startswith("quadratic"):
        return size * time**2
    if kind.startswith("logistic"):
        return size / (1.0 + np.exp((0.8 - time) / 0.05))
    if kind.startswith("plateau"):
        return size * np.clip((time - 0.6) / 0.2, 0.0, 1.0)
    if kind.startswith("bend"):
        return size * np.maximum(0.0, 2.0 * time - 1.0)
    if kind.startswith("weekends"):
        return size * weekend
    if kind.startswith("novelty"):
        return size * np.exp(-time / 0.15)
    if kind.startswith("saturation"):
        return size * (1.0 - np.exp(-time / 0.3))
    if kind.startswith("cycle"):
        return size * np.sin(2.0 * np.pi * (time / 1.5 + rng.random()))
    if kind.startswith("reversion"):
        kept, value = np.exp(-1.0 / (0.2 * days)), rng.normal(size=time.size)
        for i in range(1, value.size):
            value[i] = kept * value[i - 1] + (1.0 - kept**2) ** 0.5 * value[i]
        return size * value
    if kind.startswith("two steps"):
        moved = np.zeros(time.size)
        for _ in range(2):
            moved += rng.normal() * (time > rng.random())
        return size * moved
    if kind.startswith("heavy walk"):
        return size * np.cumsum(rng.standard_t(2.5, time.size)) * unit / math.sqrt(5.0)
    if kind.startswith("smooth walk"):
        return size * math.sqrt(3.0) * np.cumsum(np.cumsum(steps)) / days
    if kind.startswith("late bend"):
        return size * np.maximum(0.0, 5.0 * time - 4.0)
    if kind.startswith("fading weekends"):
        return size * weekend * (1.0 - time)
    return shocks


@cache
def grid(days: int = DAYS) -> TimeGrid:
    """Days from a Monday on."""
    time = MONDAY + np.arange(24 * days) * (DAY // 24)
    sums = TimeSums.of(time, np.arange(time.size), np.ones((time.size, 1)))
    return TimeGrid.of(sums, TimeOptions(period="7d"))


def series(value: np.ndarray) -> Series:
    return Series(value, np.ones(value.size), np.ones(value.size), 400.0)


def by_trend(at: TimeGrid, one: Series, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Intervals by least squares, and by moving blocks of its residuals."""
    fit, ahead = Fit.of(one, at.design), at.future_design
    value = float(fit.coefficients @ ahead)
    error = (fit.dispersion * float(ahead @ fit.covariance @ ahead)) ** 0.5
    half = float(student.ppf(0.975, fit.degrees)) * error
    days = one.value.size
    starts = rng.integers(0, days - AHEAD + 1, (400, days // AHEAD))
    index = (starts[..., None] + np.arange(AHEAD)).reshape(400, -1)
    residual = fit.residual * (days / fit.degrees) ** 0.5
    drawn = residual[index] @ at.design @ fit.covariance @ ahead
    low, high = value - np.quantile(drawn, (0.975, 0.025))
    return {"trend": (value - half, value + half), "blocks": (float(low), float(high))}


def late_change(at: TimeGrid, one: Series) -> bool:
    """Whether steps and bends at .8, .9 and .95 of the log, beside the trend and weekdays, differ
    from 0 at .05 (Bonferroni)."""
    rest = np.eye(at.cells) - at.design @ np.linalg.pinv(at.design)
    starts = np.array([0.8, 0.9, 0.95])
    since = at.time[:, None] - starts
    columns = rest @ np.concatenate([since > 0.0, np.maximum(0.0, since)], axis=1)
    z = one.value @ columns / np.sqrt((columns**2).sum(axis=0))
    return bool(np.abs(z).max() > norm.isf(0.025 / z.size))


def forecasts(kinds: tuple[str, ...], logs: int) -> None:
    names = ("mean", "trend", "blocks", "forecast")
    heads = ("values", *names, "width", "drift found", "late change", "covered there", "elsewhere")
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for number, kind in enumerate(kinds):
        rng, days = np.random.default_rng([7, len(kinds), number]), days_of(kind)
        at, unit = grid(days), 1.0 / math.sqrt(days)
        covered, width, found, late = dict.fromkeys(names, 0), [], 0, []
        for _ in range(logs):
            values = path(kind, rng)
            one = series(values[:days] + rng.normal(size=days))
            truth, mean = float(values[days:].mean()), float(one.value.mean())
            predicted = predict(at, one)
            intervals = {
                "mean": (mean - 1.96 * unit, mean + 1.96 * unit),
                **by_trend(at, one, rng),
                "forecast": (predicted.quantile(0.025), predicted.quantile(0.975)),
            }
            for name, (low, high) in intervals.items():
                covered[name] += low <= truth <= high
            low, high = intervals["forecast"]
            width.append((high - low) / (2.0 * 1.96 * unit))
            late.append((late_change(at, one), low <= truth <= high))
            found += drift_p(at, one) < 0.05
        rates = [*(covered[name] / logs for name in names), float(np.median(width)), found / logs]
        seen = [hit for where, hit in late if where]
        rest = [hit for where, hit in late if not where]
        rates += [len(seen) / logs, *(sum(one) / max(1, len(one)) for one in (seen, rest))]
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
    parser.add_argument("--kinds", choices=("chosen", "other", "fresh"))
    given = parser.parse_args()
    for name, kinds in {"chosen": CHOSEN, "other": OTHER, "fresh": FRESH}.items():
        if given.kinds in (None, name):
            forecasts(kinds, given.logs)
    if given.kinds is None:
        correlated(2 * given.logs)
