"""Coverage and width of betting confidence intervals beside gamma and log-smoothing ones.

Values of IPS on logs of `offtower benchmark validity`. "betting" bets predictable fractions as in
Waudby-Smith and Ramdas 2024 (section 4: lambda_t = sqrt(2 log(2 / alpha) / (n v_{t-1})), at most
c / m): on w (r - a) for the lower limit and on w (b - r) for the upper one, which bounds the value
without a largest weight. "log_smoothing" is the mixture over fixed bets that every report has.

    python benchmarks/experiments/betting_intervals.py 100
"""

from __future__ import annotations

import math
import sys

import numpy as np
from numpy.typing import NDArray

from offtower.benchmarks.validity.worlds import Cell, World
from offtower.evaluation import estimators as e

Array = NDArray[np.float64]

CELLS = (
    Cell("benign", 400),
    Cell("moderate", 2000),
    Cell("heavy", 2000),
    Cell("extreme", 2000),
    Cell("benign", 2000, reward="rare"),
)
GRID = np.linspace(0.0, 1.0, 401)
LARGEST = 0.75
"""c: the share of the capital that a bet may lose."""


def lower_limit(z: Array, alpha: float) -> float:
    """Largest mean in the grid that is refuted from below, for independent terms z >= 0."""
    n = z.size
    count = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(z)) / (count + 1.0)
    variance = (0.25 + np.cumsum((z - mean) ** 2)) / (count + 1.0)
    before = np.concatenate([[0.25], variance[:-1]])
    bet = np.sqrt(2.0 * math.log(1.0 / alpha) / (n * before))
    capital = np.zeros(GRID.size)
    for j, m in enumerate(GRID):
        limited = np.minimum(bet, LARGEST / max(m, 1e-12))
        capital[j] = np.cumsum(np.log1p(limited * (z - m))).max()
    refuted = capital >= math.log(1.0 / alpha)
    return float(GRID[refuted].max(initial=0.0))


def main(logs: int) -> None:
    print("| cell | interval | coverage | median width / gamma | above .5 of the range |")
    print("|---|---|---|---|---|")
    for cell in CELLS:
        world, hits, widths = World.of(cell), {}, {}  # type: ignore[var-annotated]
        truth = world.value("value")
        for log in world.logs(logs, seed=77):
            rows = log["value"]
            w, r = rows.importance_weight, rows.reward
            ips = e.IPS()
            gamma = ips.interval(rows, method="gamma", reward_range=(0.0, 1.0)).within(0.0, 1.0)
            smooth = ips.interval(rows, method="log_smoothing", reward_range=(0.0, 1.0))
            ends = {
                "gamma": (gamma.low, gamma.high),
                "log_smoothing": (smooth.low, smooth.high),
                "betting": (lower_limit(w * r, 0.025), 1.0 - lower_limit(w * (1.0 - r), 0.025)),
            }
            for name, (low, high) in ends.items():
                hits.setdefault(name, []).append(low <= truth <= high)
                widths.setdefault(name, []).append(high - low)
        for name, hit in hits.items():
            share = float(np.mean(hit))
            kept = min(max(share, 1.0 / (logs + 2)), 1.0 - 1.0 / (logs + 2))
            ratio = float(np.median(np.array(widths[name]) / np.array(widths["gamma"])))
            wide = float(np.mean(np.array(widths[name]) > 0.5))
            error = math.sqrt(kept * (1.0 - kept) / logs)
            print(
                f"| {cell.name} | {name} | {share:.3f} +- {error:.3f} | {ratio:.2f} | {wide:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]))
