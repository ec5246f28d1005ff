"""Read a running A/B test, at any time and as often as one likes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from offtower.errors import DataError
from offtower.evaluation.decision.gate import EXIT_CODES, GO, NO_GO, NOT_ENOUGH
from offtower.evaluation.intervals.methods import round_up
from offtower.experiment.assignment import Array
from offtower.experiment.bets import Bets
from offtower.experiment.martingale import DifferenceMartingale, Increments, TermState
from offtower.experiment.plan import ExperimentDesign
from offtower.experiment.rows import Chunk

LAUNCH: Literal["launch"] = "launch"
STOP: Literal["stop"] = "stop"
CONTINUE: Literal["continue"] = "continue"
_EXIT = {LAUNCH: EXIT_CODES[GO], STOP: EXIT_CODES[NO_GO], CONTINUE: EXIT_CODES[NOT_ENOUGH]}
_GRID, _WIDTHS = 41, 8.0
_BLOCK = 16_384
"""Units whose evidence is kept at a time."""


@dataclass(frozen=True)
class Reading:
    """What a test says so far.

    Attributes:
        decision: launch, stop or continue.
        new, current: units of each arm. mean_new, mean_current: of their rewards.
        estimate, std_error: of V(new) - V(current).
        low, high: bounds, each of which holds for all readings with probability 1 - alpha.
        p_value: of "the difference is at most the margin", over all readings.
        decided_at: units after which the decision was reached; None while it continues.
        more_units: until a decision if the difference is as estimated; None where one is reached,
            or the estimate does not exceed the margin.
        mismatch: the numbers of units contradict the share of the plan; no launch then.
    """

    decision: Literal["launch", "stop", "continue"]
    new: int
    current: int
    mean_new: float
    mean_current: float
    estimate: float
    std_error: float
    low: float
    high: float
    p_value: float
    decided_at: int | None
    more_units: int | None
    mismatch: bool
    design: ExperimentDesign

    @property
    def exit_code(self) -> int:
        """0 launch, 1 stop, 3 continue."""
        return _EXIT[self.decision]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "exit_code": self.exit_code}


def read_experiment(design: ExperimentDesign, units: Callable[[], Iterator[Chunk]]) -> Reading:
    """Read a test. A launch that one reading gives, every later one gives too.

    Args:
        design: of its plan, the same at every reading.
        units: gives all units so far from the first, in chunks; it is called two or three times.

    Raises:
        DataError: an arm has no unit, or a reward is outside of the plan's range.
    """
    up = DifferenceMartingale(design.assignment, design.bets, design.margin)
    wide = Bets.unknown(design.assignment.width)
    down = DifferenceMartingale(design.assignment, wide, design.margin, sign=-1.0)
    state, limit = TermState(design.assignment), math.log(1.0 / design.alpha)
    count, total = np.zeros(2, dtype=np.int64), np.zeros(2)
    decided: dict[Literal["launch", "stop"], int] = {}
    last = -math.inf
    for increments, reward, new in _increments(design, state, units):
        count += np.bincount(new, minlength=2)
        total += np.bincount(new, reward, minlength=2)
        before = state.units - reward.size
        for decision, martingale in ((LAUNCH, up), (STOP, down)):
            evidence = martingale.add(increments)
            crossed = np.flatnonzero(evidence >= limit)
            if crossed.size:
                decided.setdefault(decision, before + int(crossed[0]) + 1)
            if decision == LAUNCH:
                last = float(evidence[-1])
    if not count.all():
        raise DataError("a test needs units of both arms; one has none")
    mismatch = design.assignment.mismatch(int(count[1]), int(count[0]))
    reached = min(decided, key=lambda one: decided[one], default=None)
    if mismatch and reached == LAUNCH:
        reached = None
    estimate, error = float(state.estimate), float(state.std_error)
    low, high = _bounds(design, units, estimate, error)
    gain = estimate - design.margin
    more = None
    if reached is None and gain > 0.0 and error > 0.0:
        growth = gain**2 / (2.0 * error**2 * state.units)
        more = max(1, math.ceil((limit - last) / growth))
    return Reading(
        decision=CONTINUE if reached is None else reached,
        new=int(count[1]),
        current=int(count[0]),
        mean_new=float(total[1] / count[1]),
        mean_current=float(total[0] / count[0]),
        estimate=estimate,
        std_error=error,
        low=low,
        high=high,
        p_value=math.exp(-max(0.0, float(up.best))),
        decided_at=None if reached is None else decided[reached],
        more_units=more,
        mismatch=mismatch,
        design=design,
    )


def _increments(
    design: ExperimentDesign, state: TermState, units: Callable[[], Iterator[Chunk]]
) -> Iterator[tuple[Increments, np.ndarray, np.ndarray]]:
    least, most = design.reward_range
    for rewards, arms in units():
        for start in range(0, rewards.size, _BLOCK):
            reward, new = rewards[start : start + _BLOCK], arms[start : start + _BLOCK]
            outside = ~((reward >= least) & (reward <= most))
            if outside.any():
                at = state.units + int(np.argmax(outside))
                raise DataError(
                    f"unit {at} has the reward {reward[np.argmax(outside)]:g}, outside of the "
                    f"plan's range [{least:g}, {most:g}]: the test's bounds hold in that range only"
                )
            yield state.take(reward, new), reward, new


def _bounds(
    design: ExperimentDesign, units: Callable[[], Iterator[Chunk]], estimate: float, error: float
) -> tuple[float, float]:
    """Largest difference that is refuted from below, and smallest from above.

    On a grid, outwards rounded; bets have the sizes of the plan whatever the difference.
    """
    width = design.assignment.width
    half = _WIDTHS * error if error > 0.0 else width
    near = np.clip(np.linspace(estimate - half, estimate + half, _GRID), -width, width)
    low, high = _refuted(design, units, near)
    if low is None or high is None:
        # Bets of the plan's sizes refute only differences that are farther from the estimate than
        # many standard errors where rewards hardly vary.
        low_of_all, high_of_all = _refuted(design, units, np.linspace(-width, width, _GRID))
        low = low_of_all if low is None else low
        high = high_of_all if high is None else high
    ends = -width if low is None else low, width if high is None else high
    return ends if ends[0] <= ends[1] else (-width, width)


def _refuted(
    design: ExperimentDesign, units: Callable[[], Iterator[Chunk]], grid: Array
) -> tuple[float | None, float | None]:
    """Largest difference of `grid` that is refuted from below, and smallest from above."""
    bets = design.bets
    if design.prior is not None:
        # Effects around any difference, not above the margin only.
        width = design.assignment.width
        bets = Bets.around(0.5 * (design.prior_std_error or width), design.prior_std_error or width)
    both = [DifferenceMartingale(design.assignment, bets, grid, sign=sign) for sign in (1.0, -1.0)]
    state = TermState(design.assignment)
    for increments, _, _ in _increments(design, state, units):
        for martingale in both:
            martingale.add_total(increments)
    limit = math.log(1.0 / design.alpha)
    below, above = (np.asarray(one.best) >= limit for one in both)
    return (
        float(grid[below].max()) if below.any() else None,
        float(grid[above].min()) if above.any() else None,
    )


def describe(reading: Reading) -> list[str]:
    """Lines for people."""
    alpha = reading.design.alpha
    lines = [
        f"new policy {reading.mean_new:.4g} in {reading.new:,} units, current policy "
        f"{reading.mean_current:.4g} in {reading.current:,}",
        f"difference {reading.estimate:.4g}; at least {reading.low:.4g}, and at most "
        f"{reading.high:.4g}, each with confidence {1.0 - alpha:g} over all readings",
        f"p = {reading.p_value:.2g} that the difference is at most {reading.design.margin:g}",
    ]
    if reading.mismatch:
        lines.append(
            f"the numbers of units contradict the planned share {reading.design.share:g}: units "
            "are lost or assigned otherwise in one arm. Mend that and begin again; no launch is "
            "given"
        )
    if reading.decision == LAUNCH:
        lines.append(f"launch: decided after {reading.decided_at:,} units")
    elif reading.decision == STOP:
        lines.append(f"stop: the new policy is worse, decided after {reading.decided_at:,} units")
    else:
        more = ""
        if reading.more_units is not None:
            more = (
                f"; about {round_up(reading.more_units):,} more units decide it if the difference "
                "is as estimated"
            )
        lines.append(f"continue{more}")
    return lines
