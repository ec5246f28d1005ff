"""False launches, power and length of A/B tests that are read after every request.

python benchmarks/ab_tests.py --out results.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import norm

from offtower.experiment import Assignment, Bets, DifferenceMartingale
from offtower.experiment.martingale import TermState

ALPHA, POWER = 0.05, 0.8
_BLOCK, _CHUNK = 100, 512


@dataclass(frozen=True)
class World:
    """Clicks at rate `rate` under the current policy, and a share of requests for the new one."""

    rate: float
    share: float
    effect: float
    """That the test is planned for."""

    @property
    def fixed(self) -> int:
        """Requests of a one-sided test that is read once, at the same error and power."""
        new = self.rate + self.effect
        moment = new * (1.0 - new) / self.share + self.rate * (1.0 - self.rate) / (1.0 - self.share)
        return math.ceil(((norm.isf(ALPHA) + norm.ppf(POWER)) / self.effect) ** 2 * moment)


def launches(
    world: World,
    gain: float,
    bets: Callable[[np.random.Generator], Bets],
    tests: int,
    units: int,
    seed: int,
) -> np.ndarray:
    """(tests,) requests until each test launches; infinite for those that do not."""
    rng, assignment = np.random.default_rng(seed), Assignment(world.share, (0.0, 1.0))
    ends = []
    for start in range(0, tests, _BLOCK):
        count = min(_BLOCK, tests - start)
        state = TermState(assignment, (count,))
        martingale = DifferenceMartingale(assignment, bets(rng), 0.0)
        end = np.full(count, np.inf)
        for first in range(0, units, _CHUNK):
            n = min(_CHUNK, units - first)
            new = rng.random((count, n)) < world.share
            rate = np.where(new, world.rate + gain, world.rate)
            reward = (rng.random((count, n)) < rate).astype(np.float64)
            crossed = martingale.add(state.take(reward, new)) >= math.log(1.0 / ALPHA)
            at = np.where(crossed.any(axis=1), first + 1.0 + crossed.argmax(axis=1), np.inf)
            end = np.minimum(end, at)
        ends.append(end)
    return np.concatenate(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=int, default=10_000)
    parser.add_argument("--powered", type=int, default=2_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = []

    def measure(name: str, world: World, times: float, bets: str, tests: int) -> None:
        effect, units = world.effect, 2 * world.fixed
        priors: dict[str, Callable[[np.random.Generator], Bets]] = {
            "offline estimate": lambda rng: Bets.around(
                times * effect + 0.5 * effect * rng.normal(), effect
            ),
            "promises the effect": lambda rng: Bets.around(effect, 0.5 * effect),
            "wrong sign": lambda rng: Bets.around(-effect, 0.5 * effect),
            "none": lambda rng: Bets.unknown(1.0),
        }
        began = time.perf_counter()
        ends = launches(world, times * effect, priors[bets], tests, units, seed=len(found))
        rate = float(np.isfinite(ends).mean())
        found.append(
            {
                "world": name,
                "gain": times,
                "prior": bets,
                "tests": tests,
                "launched": rate,
                "launched_error": math.sqrt(max(rate * (1.0 - rate), 1e-9) / tests),
                "mean_units": float(np.minimum(ends, units).mean()),
                "share_of_fixed": float(np.minimum(ends, units).mean()) / world.fixed,
                "fixed_units": world.fixed,
                "seconds": time.perf_counter() - began,
            }
        )
        print(json.dumps(found[-1]), flush=True)

    even, rare = World(0.3, 0.5, 0.08), World(0.05, 0.2, 0.04)
    for name, world in (("clicks .3, share .5", even), ("clicks .05, share .2", rare)):
        measure(name, world, 0.0, "promises the effect", given.tests)
    for name, world in (("clicks .3, share .5", even), ("clicks .05, share .2", rare)):
        for times in (1.0, 1.5):
            measure(name, world, times, "offline estimate", given.powered)
    for bets in ("none", "wrong sign"):
        measure("clicks .3, share .5", even, 1.5, bets, given.powered)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
