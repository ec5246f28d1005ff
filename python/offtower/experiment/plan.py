"""Plan an A/B test from a policy's offline evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp
from scipy.stats import norm

from offtower.checksums import read_checked_json, read_json, write_checked_json
from offtower.errors import ConfigError, RunError
from offtower.experiment.assignment import Array, Assignment
from offtower.experiment.bets import Bets

SHARES = (0.05, 0.1, 0.25, 0.5)
MOST_UNITS = 1e10
"""Requests of a test that is read once, at most."""
_MULTIPLES = (1.0, 1.5, 2.0)
_PATHS, _STEPS = 1000, 400
_LONGEST = 6.0
"""Simulated tests end after this many times the units of a fixed-horizon test."""


@dataclass(frozen=True)
class OfflineEvidence:
    """What an evaluation says about a policy.

    Attributes:
        difference, std_error: V(new) - V(logging) and its standard error.
        low: end of its interval.
        variance: of the reward of a request, with the correlation of a user's requests.
        reward_range: least and largest possible reward.
    """

    policy: str
    difference: float
    std_error: float
    low: float
    variance: float
    reward_range: tuple[float, float]

    @classmethod
    def of_report(cls, path: Path, policy: str | None = None) -> OfflineEvidence:
        """Read a report.json of `offtower evaluate`.

        Raises:
            RunError: it is missing or has another form.
            ConfigError: it has several policies, and none is named.
        """
        try:
            (log, *_) = read_json(path)["logs"]
            policies = log["policies"]
            if policy is None and len(policies) > 1:
                raise ConfigError(
                    f"'{path}' has the policies {', '.join(policies)}: name one with --policy"
                )
            name = next(iter(policies)) if policy is None else policy
            if name not in policies:
                raise ConfigError(f"'{path}' has no policy '{name}', but {', '.join(policies)}")
            gap = policies[name]["estimates"][log["decide_by"]]["difference"]
            low, high = log["reward_range"]
            return cls(
                name,
                float(gap["value"]),
                float(gap["std_error"]),
                float(gap["interval"]["low"]),
                float(log["logging"]["std_error"]) ** 2 * int(log["n"]),
                (float(low), float(high)),
            )
        except FileNotFoundError:
            raise RunError(
                f"no report at '{path}': evaluate the run first (offtower evaluate)"
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError | RunError):
                raise
            raise RunError(f"'{path}' is no report of 'offtower evaluate': {error}") from error


@dataclass(frozen=True)
class ExperimentDesign:
    """What fixes a test before it begins; every reading of it uses the same.

    Attributes:
        share: probability of the new policy.
        reward_range: of a unit's reward.
        margin: V(new) - V(current) must exceed it.
        alpha: probability of a false launch, over all looks; that of a false stop too.
        prior, prior_std_error: offline estimate of the difference, and how far it may be off.
    """

    share: float
    reward_range: tuple[float, float]
    margin: float = 0.0
    alpha: float = 0.05
    prior: float | None = None
    prior_std_error: float | None = None

    def __post_init__(self) -> None:
        Assignment(self.share, self.reward_range)
        if not 0.0 < self.alpha < 1.0:
            raise ConfigError(f"alpha must lie between 0 and 1, got {self.alpha:g}")
        if (self.prior is None) != (self.prior_std_error is None):
            raise ConfigError("a prior needs its standard error, and the other way around")

    @property
    def assignment(self) -> Assignment:
        return Assignment(self.share, self.reward_range)

    @property
    def bets(self) -> Bets:
        """On effects beyond the margin."""
        if self.prior is None or self.prior_std_error is None:
            return Bets.unknown(self.assignment.width)
        return Bets.around(self.prior - self.margin, self.prior_std_error)


@dataclass(frozen=True)
class Detection:
    """What a test would do at one true effect, by simulation.

    Attributes:
        effect: true V(new) - V(current) beyond the margin.
        power: probability of a launch within the test's units. mean_units: until it ends.
    """

    effect: float
    power: float
    mean_units: float


@dataclass(frozen=True)
class ExperimentPlan:
    """A planned test.

    Attributes:
        design: fixes the readings.
        effect: that the test is to detect with probability `power`.
        units: after which it ends without a decision. fixed_units: of a test that is read once.
        detections: at 1, 1.5 and 2 times the effect.
        shares: by share of the new policy, units and what they cost if the new policy is as bad as
            the lower end of its offline interval.
    """

    design: ExperimentDesign
    effect: float
    power: float
    units: int
    fixed_units: int
    detections: tuple[Detection, ...]
    shares: tuple[tuple[float, int, float], ...]

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        content["shares"] = [
            {"share": share, "units": units, "cost": cost} for share, units, cost in self.shares
        ]
        return content

    def save(self, path: Path) -> None:
        """Write the plan; `load_design` reads it for the readings."""
        write_checked_json(path, self.to_dict())


def load_design(path: Path) -> ExperimentDesign:
    """The design in a plan.

    Raises:
        RunError: the file is missing, damaged or no plan.
    """
    try:
        content: Mapping[str, Any] = read_checked_json(path)["design"]
        low, high = content["reward_range"]
        return ExperimentDesign(**{**content, "reward_range": (float(low), float(high))})
    except FileNotFoundError:
        raise RunError(f"no plan at '{path}': write one with 'offtower experiment plan'") from None
    except (KeyError, TypeError) as error:
        raise RunError(f"'{path}' is no plan of 'offtower experiment plan': {error}") from error


def plan_experiment(
    evidence: OfflineEvidence,
    *,
    share: float | None = None,
    effect: float | None = None,
    units: int | None = None,
    power: float = 0.8,
    margin: float = 0.0,
    alpha: float = 0.05,
) -> ExperimentPlan:
    """Plan a test of the new policy against the current one.

    Args:
        share: of the requests for the new policy; by default the smallest of SHARES whose test fits
            into `units`, else one half.
        effect: to detect beyond the margin; by default the offline estimate's.
        units: requests that are there for the test.
        power: probability of a launch at the effect.

    Raises:
        ConfigError: a number is out of its range, or the offline estimate is not above the margin
            and no effect is given.
    """
    if not 0.0 < power < 1.0:
        raise ConfigError(f"the power must lie between 0 and 1, got {power:g}")
    if effect is None:
        effect = evidence.difference - margin
        if not effect > 0.0:
            raise ConfigError(
                f"the offline estimate {evidence.difference:.4g} is not above the margin "
                f"{margin:g}: say with --effect which difference the test is to detect"
            )
    if not effect > 0.0:
        raise ConfigError(f"the effect to detect must be positive, got {effect:g}")
    least, most = evidence.reward_range
    if not margin + effect <= most - least:
        raise ConfigError(
            f"rewards in [{least:g}, {most:g}] allow no difference of {margin + effect:g}: the "
            "effect to detect, beyond the margin, must be smaller"
        )
    if not evidence.variance > 0.0:
        raise ConfigError("all rewards of the log are equal: there is nothing to detect")
    _check_effect(evidence, effect, power, alpha)
    # Online the effect may be another: half of it is added to the estimate's own error.
    spread = math.hypot(evidence.std_error, 0.5 * max(abs(evidence.difference), effect))
    design = ExperimentDesign(
        0.5, evidence.reward_range, margin, alpha, evidence.difference, spread
    )
    rows = []
    for one in sorted({*SHARES, *([] if share is None else [share])}):
        needed = _units(replace(design, share=one), evidence, effect, power)
        rows.append((one, needed, one * needed * max(0.0, -evidence.low)))
    if share is None:
        fitting = [one for one, needed, _ in rows if units is not None and needed <= units]
        share = min(fitting, default=0.5)
    design = replace(design, share=share)
    needed = next(needed for one, needed, _ in rows if one == share)
    moment = evidence.variance / (share * (1.0 - share))
    fixed = _fixed_units(moment, effect, power, alpha)
    horizon = min(needed, units) if units is not None else needed
    return ExperimentPlan(
        design,
        effect,
        power,
        horizon,
        fixed,
        tuple(_detection(design, moment, k * effect, horizon) for k in _MULTIPLES),
        tuple(rows),
    )


def _check_effect(evidence: OfflineEvidence, effect: float, power: float, alpha: float) -> None:
    """Raise ConfigError for an effect that no test of MOST_UNITS requests would show."""
    moment = 4.0 * evidence.variance  # With half of the requests for each arm.
    least = math.sqrt(_squared_effect(moment, power, alpha) / MOST_UNITS)
    if effect < least:
        raise ConfigError(
            f"an effect of {effect:g} would need more than {MOST_UNITS:.0e} requests, which no "
            f"test has: with so many, an effect of {least:.2g} can be detected. Give a larger "
            "--effect"
        )


def _fixed_units(moment: float, effect: float, power: float, alpha: float) -> int:
    return math.ceil(_squared_effect(moment, power, alpha) / effect**2)


def _squared_effect(moment: float, power: float, alpha: float) -> float:
    """Square of the effect that a test of one unit detects."""
    quantiles = float(norm.isf(alpha) + norm.ppf(power))
    return quantiles**2 * moment


def _units(design: ExperimentDesign, evidence: OfflineEvidence, effect: float, power: float) -> int:
    """Units after which a launch has the power."""
    moment = evidence.variance / (design.share * (1.0 - design.share))
    longest = math.ceil(_LONGEST * _fixed_units(moment, effect, power, design.alpha))
    ends = np.sort(_ends(design, moment, effect, longest))
    at = ends[math.ceil(power * ends.size) - 1]
    return int(at) if math.isfinite(at) else longest


def _detection(design: ExperimentDesign, moment: float, effect: float, units: int) -> Detection:
    ends = _ends(design, moment, effect, units)
    return Detection(effect, float(np.isfinite(ends).mean()), float(np.minimum(ends, units).mean()))


def _ends(design: ExperimentDesign, moment: float, effect: float, longest: int) -> Array:
    """Units at which simulated tests launch, infinite where they do not; a Brownian approximation.

    moment: variance of a unit's term.
    """
    steps = np.linspace(0.0, 1.0, _STEPS + 1)[1:] ** 1.5 * longest
    width = np.diff(steps, prepend=0.0)
    noise = np.random.default_rng(0).normal(size=(_PATHS, _STEPS))
    total = np.cumsum(effect * width + np.sqrt(moment * width) * noise, axis=1)
    bets = design.bets
    ends = np.full(_PATHS, np.inf)
    for start in range(0, _PATHS, 100):  # (100, steps, effects) at a time
        part = total[start : start + 100, :, None]
        capital = bets.effect * part / moment - 0.5 * bets.effect**2 * steps[:, None] / moment
        crossed = logsumexp(bets.log_weight + capital, axis=2) >= math.log(1.0 / design.alpha)
        first = crossed.argmax(axis=1)
        ends[start : start + 100] = np.where(crossed.any(axis=1), steps[first], np.inf)
    found: Array = np.ceil(ends)
    return found


def describe(plan: ExperimentPlan) -> Sequence[str]:
    """Lines for people."""
    design = plan.design
    saved = 1.0 - plan.detections[1].mean_units / plan.fixed_units
    lines = [
        f"give the new policy {design.share:.0%} of the requests, for up to {plan.units:,} of "
        "them; read the test as often as you like",
        f"a launch without a gain above {design.margin:g} has probability at most "
        f"{design.alpha:g}, over all readings",
    ]
    lines += [
        f"a gain of {one.effect:.4g}: launched with probability {one.power:.2f}, after "
        f"{one.mean_units:,.0f} requests on average"
        for one in plan.detections
    ]
    lines.append(
        f"a test that is read once needs {plan.fixed_units:,} requests for {plan.effect:.4g}; at "
        f"1.5 times that gain this one takes {abs(saved):.0%} {'fewer' if saved > 0 else 'more'}"
    )
    lines += [
        f"with a share of {share:.0%}: up to {units:,} requests, and at most a loss of {cost:,.4g} "
        "in reward if the new policy is as bad as the lower end of its interval"
        for share, units, cost in plan.shares
    ]
    return lines
