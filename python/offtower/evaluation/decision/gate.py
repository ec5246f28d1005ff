"""The gate: decide whether to deploy a policy in place of the logging policy."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from offtower.config import GateOptions
from offtower.evaluation.decision.support import SupportDiagnostics
from offtower.evaluation.decision.weights import PositionWeight, WeightDiagnostics
from offtower.evaluation.intervals.methods import Interval, round_up
from offtower.evaluation.intervals.statistics import Estimate

GO: Literal["go"] = "go"
NO_GO: Literal["no-go"] = "no-go"
NOT_ENOUGH: Literal["not enough evidence"] = "not enough evidence"
Decision = Literal["go", "no-go", "not enough evidence"]

EXIT_CODES: dict[str, int] = {GO: 0, NO_GO: 1, NOT_ENOUGH: 3}
"""Exit code of a command that ends in a verdict; 2 is for refused input."""
_PREFERENCE = (GO, NOT_ENOUGH, NO_GO)


@dataclass(frozen=True)
class Reason:
    """A code for machines, a sentence for people.

    kind: "evidence" decided, "doubt" prevented a decision, "note" is context.
    """

    code: str
    message: str
    kind: Literal["evidence", "doubt", "note"]


@dataclass(frozen=True)
class Verdict:
    """The decision on one policy."""

    decision: Decision
    reasons: tuple[Reason, ...]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.decision]

    def to_dict(self) -> dict[str, Any]:
        return {
            "decision": self.decision,
            "exit_code": self.exit_code,
            "reasons": [asdict(reason) for reason in self.reasons],
        }


@dataclass(frozen=True)
class Evidence:
    """Input of a verdict.

    Attributes:
        difference, interval: V(new) - V(logging) by the deciding estimator, and its interval.
        weights: diagnostics of the importance weights.
        guaranteed: the logarithmic-smoothing interval of the difference; None where rows are
            clustered by user.
        support: a probe from the target policy's side, where one was made.
        estimator: name of the deciding estimator. consistent: whether its bias vanishes.
        propensities_estimated: the log had none, and they were estimated.
        mean_weight_low: lower bound on the mean weight at any tail
            (`SmoothingSums.mean_weight`); above 1 the propensities are wrong.
        users: number of users where the interval is by user.
        sensitivity: factor by which estimated propensities may be wrong before the estimate leaves
            its side of the margin (`SensitivitySums.largest_factor`).
        positions: mean weights by position, for slates.
        rounding: size of a difference that the rounding of log-probabilities explains.
        rewarded: number of rows (rounds of slates) whose reward is not 0.
        possible: least and largest difference that the range of rewards allows.
        least_units: independent rows, or users, from which the estimator fits coefficients.
    """

    difference: Estimate
    interval: Interval
    weights: WeightDiagnostics
    guaranteed: Interval | None
    support: SupportDiagnostics | None
    estimator: str
    consistent: bool
    propensities_estimated: bool = False
    mean_weight_low: float | None = None
    users: int | None = None
    positions: tuple[PositionWeight, ...] = ()
    sensitivity: float | None = None
    rounding: float = 0.0
    rewarded: int | None = None
    possible: tuple[float, float] = (-math.inf, math.inf)
    least_units: int = 0


def decide(evidence: Evidence, options: GateOptions | None = None) -> Verdict:
    """Decide on one policy.

    Go where the interval of V(new) - V(logging) lies above the margin, no-go where it lies below,
    unless a diagnostic casts doubt. The logarithmic-smoothing interval needs no large n and no
    light tail, so it decides alone too, unless the propensities are in doubt.
    """
    options = options or GateOptions()
    margin, interval, guaranteed = options.margin, evidence.interval, evidence.guaranteed
    propensity_doubts = _propensity_doubts(evidence, options)
    doubts = propensity_doubts + _tail_doubts(evidence, options)
    notes = _notes(evidence)
    if guaranteed is not None and not propensity_doubts and not evidence.propensities_estimated:
        side = _side(guaranteed, margin)
        if side is not None:
            reason = _evidence(guaranteed, margin, "guaranteed_interval", "at any number of rows")
            softened = [replace(doubt, kind="note") for doubt in doubts]
            return Verdict(side, (reason, *softened, *notes))
    side = _side(interval, margin, evidence.rounding)
    if side is None and _side(interval, margin) is not None:
        return Verdict(NOT_ENOUGH, (*doubts, _within_rounding(evidence), *notes))
    if side is None:
        return Verdict(NOT_ENOUGH, (*doubts, _contains_margin(evidence, margin), *notes))
    reason = _evidence(interval, margin, "interval", f"by {evidence.estimator}")
    if not doubts:
        return Verdict(side, (reason, *notes))
    unreliable = Reason(reason.code, f"{reason.message}, but it is not reliable", "note")
    return Verdict(NOT_ENOUGH, (*doubts, unreliable, *notes))


def withhold(verdict: Verdict, message: str) -> Verdict:
    """The verdict without "go", on a log that had a part in learning or choosing the policy.

    A "no-go" stands: such a log makes a policy look better than it is.
    """
    if verdict.decision == NO_GO:
        return Verdict(NO_GO, (*verdict.reasons, Reason("not_held_out", message, "note")))
    softened = [
        replace(one, kind="note") if one.kind == "evidence" else one for one in verdict.reasons
    ]
    return Verdict(NOT_ENOUGH, (_doubt("not_held_out", message), *softened))


def best_exit_code(verdicts: list[Verdict]) -> int:
    """Exit code of the best verdict of several: go, else not enough evidence, else no-go."""
    decisions = {verdict.decision for verdict in verdicts}
    return next((EXIT_CODES[d] for d in _PREFERENCE if d in decisions), EXIT_CODES[NOT_ENOUGH])


def _side(interval: Interval, margin: float, rounding: float = 0.0) -> Decision | None:
    if interval.low > margin + rounding:
        return GO
    return NO_GO if interval.high < margin - rounding else None


def _within_rounding(evidence: Evidence) -> Reason:
    return _doubt(
        "no_variation",
        f"V(new) - V(logging) is {evidence.difference.value:.1g}, which the rounding of "
        "log-probabilities explains: both policies are the same on this log",
    )


def _evidence(interval: Interval, margin: float, code: str, how: str) -> Reason:
    where = "above" if interval.low > margin else "below"
    return Reason(
        code,
        f"V(new) - V(logging) lies in [{interval.low:.4g}, {interval.high:.4g}] with confidence "
        f"{interval.confidence:.4g} ({interval.method} interval, {how}), {where} {margin:g}",
        "evidence",
    )


def _contains_margin(evidence: Evidence, margin: float) -> Reason:
    interval = evidence.interval
    text = (
        f"V(new) - V(logging) is {evidence.difference.value:.4g}, but its interval "
        f"[{interval.low:.4g}, {interval.high:.4g}] (confidence {interval.confidence:.4g}, by "
        f"{evidence.estimator}) contains {margin:g}"
    )
    value = evidence.difference.value
    distance = abs(value - margin)
    half = value - interval.low if value > margin else interval.high - value
    if interval.rows_needed is not None:
        text += (
            "; it is wide because the log may lack rows of large weight or reward: about "
            f"{interval.rows_needed:,} rows would give one of useful width"
        )
    elif 0.0 < distance < half and half / distance < 1e4:
        rows = evidence.difference.n * (half / distance) ** 2
        text += f"; if that difference is true, about {round_up(rows):,} rows would show it"
    return Reason("interval_holds_margin", text, "doubt")


def _propensity_doubts(evidence: Evidence, options: GateOptions) -> list[Reason]:
    weights, doubts = evidence.weights, []
    off = weights.mean - 1.0
    z = abs(weights.mean_z or 0.0)
    if z > options.max_mean_weight_z and abs(off) > options.max_mean_weight_error:
        causes = (
            "items that the log cannot show, an unseen tail of weights, or wrong propensities"
            if off < 0.0
            else "wrong propensities"
        )
        doubts.append(
            _doubt(
                "mean_weight",
                f"the mean importance weight is {weights.mean:.4g}, {z:.1f} standard errors from "
                f"1: {causes}",
            )
        )
    elif evidence.mean_weight_low is not None and evidence.mean_weight_low > 1.0:
        doubts.append(
            _doubt(
                "mean_weight",
                f"the mean importance weight is at least {evidence.mean_weight_low:.4g}, and the "
                "mean of a ratio of probabilities is at most 1: wrong propensities",
            )
        )
    off_positions = [
        one
        for one in evidence.positions
        if abs(one.z or 0.0) > options.max_mean_weight_z
        and abs(one.mean - 1.0) > options.max_mean_weight_error
    ]
    if off_positions:
        listed = ", ".join(f"{one.mean:.4g} at position {one.position}" for one in off_positions)
        doubts.append(
            _doubt(
                "position_weight",
                f"the mean importance weight is {listed}, more than "
                f"{options.max_mean_weight_z:g} standard errors from 1: propensities of another "
                "kind than the log's pscore_kind, or items that the log cannot show",
            )
        )
    distance = abs(evidence.difference.value - options.margin)
    z = abs(weights.balance_z or 0.0)
    balance = abs(weights.balance or 0.0)
    if z > options.max_mean_weight_z and balance > options.max_balance_share * distance:
        doubts.append(
            _doubt(
                "balance",
                "the weighted mean of the reward model's predictions on the log differs from their "
                f"mean under the new policy by {weights.balance:.4g}, {z:.1f} standard errors: "
                "wrong propensities",
            )
        )
    if weights.n > 1 and weights.effective_sample_size == 0.0:
        doubts.append(_doubt("no_support", "no logged action has weight under the new policy"))
    return doubts


def _tail_doubts(evidence: Evidence, options: GateOptions) -> list[Reason]:
    weights, users, support = evidence.weights, evidence.users, evidence.support
    n, size, tail = weights.n, weights.effective_sample_size, weights.pareto_k
    doubts = []
    if n < options.min_rows:
        doubts.append(_doubt("too_few_rows", f"{n} rows, at least {options.min_rows} required"))
    if evidence.rewarded is not None and evidence.rewarded < options.min_rewarded_rows:
        text = (
            f"{evidence.rewarded} of {n:,} rows have a reward other than 0, at least "
            f"{options.min_rewarded_rows} required"
        )
        doubts.append(_doubt("too_few_rewarded_rows", text))
    units = n if users is None else users
    if units < evidence.least_units:
        text = (
            f"{evidence.estimator} fits coefficients to {evidence.least_units} independent rows or "
            f"users at least, and the log has {units}: it is the estimate without fitted ones"
        )
        doubts.append(_doubt("too_few_units", text))
    difference, (least, most) = evidence.difference.value, evidence.possible
    if not least <= difference <= most:
        text = (
            f"V(new) - V(logging) is estimated as {difference:.4g}, and the range of rewards "
            f"allows {least:g} to {most:g}: too few rows, wrong propensities, or a wrong "
            "reward_range"
        )
        doubts.append(_doubt("impossible_difference", text))
    if users is not None and users < options.min_users:
        text = f"{users} users, at least {options.min_users} required"
        doubts.append(_doubt("too_few_users", text))
    if size < options.min_effective_sample_size:
        text = (
            f"the weighted rows carry as much information as {size:.1f} of {n:,} unweighted ones, "
            f"at least {options.min_effective_sample_size:g} required"
        )
        doubts.append(_doubt("effective_sample_size", text))
    if tail is not None and tail > options.max_pareto_k:
        text = (
            f"the weights have a heavy tail (Pareto k {tail:.2f}, at most "
            f"{options.max_pareto_k:g} allowed): standard errors are too small"
        )
        doubts.append(_doubt("weight_tail", text))
    if not evidence.difference.std_error > 0.0:
        text = (
            "the difference does not vary between rows (both policies act alike, or all rewards "
            "are equal): it has no interval"
        )
        doubts.append(_doubt("no_variation", text))
    if support is not None and support.missing > options.max_missing_support:
        text = (
            f"{100 * support.missing:.2g} % of what the new policy shows was never shown by the "
            "logging policy: the log has no rewards for it"
        )
        doubts.append(_doubt("support", text))
    elif support is not None and (support.hidden or 0.0) > options.max_missing_support:
        text = (
            f"{100 * (support.hidden or 0.0):.2g} % of what the new policy shows is so unlikely "
            f"under the logging policy that less than one of {n:,} rows is expected to show it: "
            "the log has no rewards for it"
        )
        doubts.append(_doubt("hidden_support", text))
    return doubts


def _doubt(code: str, message: str) -> Reason:
    return Reason(code, message, "doubt")


def _notes(evidence: Evidence) -> list[Reason]:
    notes = []
    if evidence.propensities_estimated:
        text = (
            "THE PROPENSITIES ARE ESTIMATES: the log had none, and no interval here covers their "
            "error"
        )
        notes.append(Reason("propensities_estimated", text, "note"))
        if evidence.sensitivity is not None:
            text = (
                "the estimate stays on its side of the margin while no estimated propensity is "
                f"wrong by more than a factor of {evidence.sensitivity:.3g}"
            )
            notes.append(Reason("sensitivity", text, "note"))
    if not evidence.consistent:
        text = f"{evidence.estimator} may be biased, and its interval does not cover the bias"
        notes.append(Reason("biased_estimator", text, "note"))
    return notes
