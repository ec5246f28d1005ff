"""Coverage and width of betting confidence intervals beside gamma and log-smoothing ones.

Values of IPS on logs of `offtower benchmark validity`. Betting intervals bet by the variance of the
rows so far; "log_smoothing", which every report has, mixes fixed bets.

    python benchmarks/experiments/betting_intervals.py 100
"""

from __future__ import annotations

import math
import sys

import numpy as np

from offtower.benchmarks.validity.worlds import Cell, World
from offtower.evaluation import estimators as e

CELLS = (
    Cell("benign", 400),
    Cell("moderate", 2000),
    Cell("heavy", 2000),
    Cell("extreme", 2000),
    Cell("benign", 2000, reward="rare"),
)


def main(logs: int) -> None:
    print("| cell | interval | coverage | median width / gamma | above .5 of the range |")
    print("|---|---|---|---|---|")
    for cell in CELLS:
        world, hits, widths = World.of(cell), {}, {}  # type: ignore[var-annotated]
        truth = world.value("value")
        for log in world.logs(logs, seed=77):
            rows = log["value"]
            ips = e.IPS()
            gamma = ips.interval(rows, method="gamma", reward_range=(0.0, 1.0)).within(0.0, 1.0)
            smooth = ips.interval(rows, method="log_smoothing", reward_range=(0.0, 1.0))
            betting = ips.interval(rows, method="betting", reward_range=(0.0, 1.0))
            for one in (gamma, smooth, betting):
                hits.setdefault(one.method, []).append(one.low <= truth <= one.high)
                widths.setdefault(one.method, []).append(one.high - one.low)
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
