"""The gate: shall the new policy replace the logging policy? A verdict with its reasons."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from offtower.config import GateOptions
from offtower.evaluation.decision.diagnostics import SupportDiagnostics, WeightDiagnostics
from offtower.evaluation.intervals.methods import Interval
from offtower.evaluation.intervals.statistics import Estimate

GO: Literal["go"] = "go"
NO_GO: Literal["no-go"] = "no-go"
NOT_ENOUGH: Literal["not enough evidence"] = "not enough evidence"
Decision = Literal["go", "no-go", "not enough evidence"]

EXIT_CODES: dict[str, int] = {GO: 0, NO_GO: 1, NOT_ENOUGH: 3}
"""Exit code of a command that ends in a verdict; 2 stays for refused input."""
_PREFERENCE = (GO, NOT_ENOUGH, NO_GO)


@dataclass(frozen=True)
class Reason:
    """Why: a code for machines, a sentence for people.

    kind: "evidence" carried the verdict, "doubt" kept one back, "note" is worth knowing.
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
    """What a verdict is made from.

    Attributes:
        difference, interval: V(new) - V(logging) by the deciding estimator, and its interval.
        weights: diagnostics of the importance weights.
        guaranteed: the logarithmic-smoothing interval of the difference; None where rows hang
            together by user.
        support: a target-side probe, where one was made.
        estimator: name of the deciding estimator. consistent: whether its bias vanishes.
        propensities_estimated: the log had none, and they were estimated.
        mean_weight_low: lower bound on the mean weight at any tail
            (`SmoothingSums.mean_weight`); above 1 the propensities are wrong.
        users: number of users where the interval is by user.
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


def decide(evidence: Evidence, options: GateOptions | None = None) -> Verdict:
    """The verdict on one policy.

    Go where the interval of V(new) - V(logging) lies above the margin, no-go where it lies below,
    and the diagnostics leave no doubt. The logarithmic-smoothing interval needs no large n and no
    light tail, so it decides alone too, unless the propensities are in doubt.
    """
    options = options or GateOptions()
    margin, interval, sure = options.margin, evidence.interval, evidence.guaranteed
    mistrust = _propensity_doubts(evidence, options)
    doubts = mistrust + _tail_doubts(evidence, options)
    notes = _notes(evidence)
    if sure is not None and not mistrust and not evidence.propensities_estimated:
        side = _side(sure, margin)
        if side is not None:
            reason = _evidence(sure, margin, "guaranteed_interval", "at any number of rows")
            softened = tuple(Reason(d.code, d.message, "note") for d in doubts)
            return Verdict(side, (reason, *softened, *notes))
    side = _side(interval, margin)
    if side is not None and not doubts:
        reason = _evidence(interval, margin, "interval", f"by {evidence.estimator}")
        return Verdict(side, (reason, *notes))
    if side is None:
        doubts.append(_straddles(evidence, margin))
    else:
        seen = _evidence(interval, margin, "interval", f"by {evidence.estimator}")
        notes.insert(0, Reason(seen.code, f"{seen.message}, but it cannot be believed", "note"))
    return Verdict(NOT_ENOUGH, (*doubts, *notes))


def best_exit_code(verdicts: list[Verdict]) -> int:
    """Exit code of the best verdict of several: go, else not enough evidence, else no-go."""
    decisions = {verdict.decision for verdict in verdicts}
    return next((EXIT_CODES[d] for d in _PREFERENCE if d in decisions), EXIT_CODES[NOT_ENOUGH])


def _side(interval: Interval, margin: float) -> Decision | None:
    if interval.low > margin:
        return GO
    if interval.high < margin:
        return NO_GO
    return None


def _evidence(interval: Interval, margin: float, code: str, how: str) -> Reason:
    where = "above" if interval.low > margin else "below"
    return Reason(
        code,
        f"V(new) - V(logging) lies in [{interval.low:.4g}, {interval.high:.4g}] with confidence "
        f"{interval.confidence:.4g} ({interval.method} interval, {how}), {where} {margin:g}",
        "evidence",
    )


def _straddles(evidence: Evidence, margin: float) -> Reason:
    interval = evidence.interval
    text = (
        f"V(new) - V(logging) is {evidence.difference.value:.4g}, but its interval "
        f"[{interval.low:.4g}, {interval.high:.4g}] (confidence {interval.confidence:.4g}, by "
        f"{evidence.estimator}) holds {margin:g}"
    )
    distance = abs(evidence.difference.value - margin)
    half = 0.5 * (interval.high - interval.low)
    if 0.0 < distance < half and half / distance < 1e4:
        rows = evidence.difference.n * (half / distance) ** 2
        text += f"; if that difference is true, about {_round_up(rows):,} rows would tell"
    return Reason("interval_holds_margin", text, "doubt")


def _propensity_doubts(evidence: Evidence, options: GateOptions) -> list[Reason]:
    weights, doubts = evidence.weights, []
    off = weights.mean - 1.0
    if (
        weights.mean_z is not None
        and abs(weights.mean_z) > options.max_mean_weight_z
        and abs(off) > options.max_mean_weight_error
    ):
        cause = (
            "items that the log cannot show, a tail of weights that was not seen, or"
            if off < 0.0
            else "that is"
        )
        doubts.append(
            Reason(
                "mean_weight",
                f"the mean importance weight is {weights.mean:.4g}, {abs(weights.mean_z):.1f} "
                f"standard errors from 1: {cause} wrong propensities",
                "doubt",
            )
        )
    elif evidence.mean_weight_low is not None and evidence.mean_weight_low > 1.0:
        doubts.append(
            Reason(
                "mean_weight",
                f"the mean importance weight is at least {evidence.mean_weight_low:.4g}, and no "
                "ratio of probabilities averages above 1: wrong propensities",
                "doubt",
            )
        )
    distance = abs(evidence.difference.value - options.margin)
    if (
        weights.balance is not None
        and abs(weights.balance_z or 0.0) > options.max_mean_weight_z
        and abs(weights.balance) > options.max_balance_share * distance
    ):
        doubts.append(
            Reason(
                "balance",
                f"the weights do not carry the reward model's predictions from the log to the new "
                f"policy: they are off by {weights.balance:.4g}, "
                f"{abs(weights.balance_z or 0.0):.1f} standard errors from 0: wrong propensities",
                "doubt",
            )
        )
    if weights.n > 1 and weights.effective_sample_size == 0.0:
        doubts.append(
            Reason("no_support", "no logged action has weight under the new policy", "doubt")
        )
    return doubts


def _tail_doubts(evidence: Evidence, options: GateOptions) -> list[Reason]:
    weights, support = evidence.weights, evidence.support
    error = evidence.difference.std_error
    checks = [
        (
            weights.n < options.min_rows,
            "too_few_rows",
            f"only {weights.n} rows, {options.min_rows} asked for",
        ),
        (
            evidence.users is not None and evidence.users < options.min_users,
            "too_few_users",
            f"only {evidence.users} users, {options.min_users} asked for",
        ),
        (
            weights.effective_sample_size < options.min_effective_sample_size,
            "effective_sample_size",
            f"the weights leave {weights.effective_sample_size:.1f} effective rows of "
            f"{weights.n:,}, {options.min_effective_sample_size:g} asked for",
        ),
        (
            weights.pareto_k is not None and weights.pareto_k > options.max_pareto_k,
            "weight_tail",
            f"the weights have a heavy tail (Pareto k {weights.pareto_k or 0.0:.2f}, at most "
            f"{options.max_pareto_k:g} asked for): standard errors are too small",
        ),
        (
            not error > 0.0,
            "no_variation",
            "the difference has no measurable spread (both policies act alike, or all rewards "
            "are alike): its interval means nothing",
        ),
        (
            support is not None and support.missing > options.max_missing_support,
            "support",
            f"{100 * support.missing if support else 0:.2g} % of what the new policy shows was "
            "never shown by the logging policy: nothing is known of it",
        ),
        (
            support is not None
            and support.missing <= options.max_missing_support
            and (support.hidden or 0.0) > options.max_missing_support,
            "hidden_support",
            f"{100 * ((support.hidden if support else None) or 0.0):.2g} % of what the new policy "
            f"shows is so unlikely under the logging policy that {weights.n:,} rows are expected "
            "to hold not one row of it: nothing is known of it",
        ),
    ]
    return [Reason(code, text, "doubt") for failed, code, text in checks if failed]


def _notes(evidence: Evidence) -> list[Reason]:
    notes = []
    if evidence.propensities_estimated:
        notes.append(
            Reason(
                "propensities_estimated",
                "THE PROPENSITIES ARE ESTIMATES: the log had none, and no interval here covers "
                "their error",
                "note",
            )
        )
    if not evidence.consistent:
        notes.append(
            Reason(
                "biased_estimator",
                f"{evidence.estimator} may be biased, and its interval does not cover that",
                "note",
            )
        )
    return notes


def _round_up(rows: float) -> int:
    """To two digits."""
    unit = 10.0 ** max(0, math.floor(math.log10(rows)) - 1)
    return int(math.ceil(rows / unit) * unit)
