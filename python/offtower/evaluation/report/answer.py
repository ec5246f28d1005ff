"""The first screen of a report: the answer in plain words, for the person who decides."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection
from dataclasses import dataclass

from offtower.evaluation.decision.gate import GO, NO_GO, NOT_ENOUGH, Reason
from offtower.evaluation.result import Gap, PolicyEvaluation
from offtower.evaluation.run import LogEvaluation

PER = 1000
"""Requests that the figures are stated for."""

_PROPENSITIES = "the logged probabilities look wrong"
_SUPPORT = "the log has hardly any results for what the new policy would show"
_NOT_HELD_OUT = "this log had a part in learning or choosing it"
_DRIFT = "the difference to what is served today changed over the time of the log"
_TAIL = "a few rows of the log decide the whole estimate"
_CAUSES = {
    "mean_weight": _PROPENSITIES,
    "balance": _PROPENSITIES,
    "no_support": _SUPPORT,
    "effective_sample_size": _SUPPORT,
    "support": _SUPPORT,
    "hidden_support": _SUPPORT,
    "weight_tail": _TAIL,
    "too_few_rows": "the log is too small",
    "too_few_rewarded_rows": "too few rows of the log have a reward",
    "too_few_users": "the log has too few users",
    "no_variation": "the log cannot tell the two policies apart",
    "not_held_out": _NOT_HELD_OUT,
    "drift": _DRIFT,
    "weight_drift": _PROPENSITIES,
}
_ANSWERS = {GO: "yes", NO_GO: "no", NOT_ENOUGH: "not yet"}
_MOST_ROWS = 100
"""A log of more than this many times the rows is not recommended."""


@dataclass(frozen=True)
class PolicyAnswer:
    """What the log says about one policy.

    Attributes:
        name: of the policy, the same everywhere in the report.
        decision: of the gate. answer: the same in a word. served: whether a run serves it so.
        value: its figure per 1,000 requests. difference: to the logging policy, likewise.
        interval: of the difference, in words.
    """

    name: str
    decision: str
    answer: str
    served: bool
    value: str
    difference: str
    interval: str


@dataclass(frozen=True)
class Answer:
    """The answer of one evaluation.

    Attributes:
        question: that the evaluation answers. headline: the answer in a few words.
        sentence: the answer with its figures.
        figure, figure_unit: the difference that matters most, and what it counts.
        interval: of that figure, in words.
        sensitivity: how wrong estimated probabilities may be; None where they were logged.
        over_time: how its value changed over the log and what it may be next, in sentences.
        simpler: names a simple policy that would earn more; None where there is none.
        remedy: what would make it certain. command: to run next.
        policies: the answer for each policy.
    """

    question: str
    headline: str
    decision: str
    sentence: str
    figure: str
    figure_unit: str
    interval: str
    sensitivity: str | None
    over_time: tuple[str, ...]
    simpler: str | None
    remedy: str | None
    command: str | None
    policies: tuple[PolicyAnswer, ...]
    baselines: tuple[tuple[str, str, str], ...]
    """(name, value per 1,000 requests, difference to today) of simple policies."""


def answer_of(evaluation: LogEvaluation) -> Answer:
    """The first screen of an evaluation: its best policy's answer, and each policy's."""
    result = evaluation.result
    names = [name for name in result.policies if name not in evaluation.also]
    order = {GO: 0, NOT_ENOUGH: 1, NO_GO: 2}

    def rank(name: str) -> tuple[int, float]:
        policy = result.policies[name]
        return order[policy.verdict.decision], -_gap(evaluation, policy).estimate.value

    best = min(names, key=rank)
    policy = result.policies[best]
    gap, decision = _gap(evaluation, policy), policy.verdict.decision
    logged = result.logging.estimate.value
    scale = max(abs(logged), abs(gap.estimate.value), 1e-300) * PER
    change = _more(gap.estimate.value, scale)
    between = _between(gap, scale)
    if decision == GO:
        headline = f"Yes: serve {best}"
        sentence = (
            f"{best} would earn {per_requests(logged + gap.estimate.value, scale)} per {PER:,} "
            f"requests instead of today's {per_requests(logged, scale)}: {change}."
        )
    elif decision == NO_GO:
        headline = "No: keep what is served today"
        sentence = (
            f"{_subject(names, best)} would earn "
            f"{per_requests(logged + gap.estimate.value, scale)} per {PER:,} requests instead of "
            f"today's {per_requests(logged, scale)}: {change}."
        )
    else:
        headline = "Not yet: this log cannot decide"
        sentence = (
            f"What is served today earns {per_requests(logged, scale)} per {PER:,} requests. "
            f"{_subject(names, best)} may earn {between} that: {_cause(policy)}."
        )
    return Answer(
        question=_question(names),
        headline=headline,
        decision=decision,
        sentence=sentence,
        figure=_signed(gap.estimate.value, scale),
        figure_unit=_unit(evaluation),
        interval=f"{_percent(gap.simultaneous.confidence)} confidence: {between} today",
        sensitivity=_sensitivity(evaluation, policy),
        over_time=_over_time(evaluation, best, scale),
        simpler=_simpler(evaluation, best, logged + gap.estimate.value, scale),
        remedy=_remedy(evaluation, policy),
        command=_command(evaluation, best, policy),
        policies=tuple(_policy(evaluation, name, scale) for name in result.policies),
        baselines=tuple(
            (
                name,
                per_requests(one.estimate.value, scale),
                _signed(one.estimate.value - logged, scale),
            )
            for name, one in evaluation.baseline_values.items()
        ),
    )


def per_requests(value: float, scale: float) -> str:
    """A value per request as one per 1,000 requests, with about three digits of `scale`."""
    digits = min(9, max(0, 2 - math.floor(math.log10(scale))))
    return f"{value * PER:,.{digits}f}".replace("-", "−")


def _policy(evaluation: LogEvaluation, name: str, scale: float) -> PolicyAnswer:
    policy = evaluation.result.policies[name]
    gap = _gap(evaluation, policy)
    logged = evaluation.result.logging.estimate.value
    return PolicyAnswer(
        name=name,
        decision=policy.verdict.decision,
        answer=_ANSWERS[policy.verdict.decision],
        served=name not in evaluation.also,
        value=per_requests(logged + gap.estimate.value, scale),
        difference=_signed(gap.estimate.value, scale),
        interval=(
            f"{_signed(gap.simultaneous.low, scale)} to {_signed(gap.simultaneous.high, scale)}"
        ),
    )


def _gap(evaluation: LogEvaluation, policy: PolicyEvaluation) -> Gap:
    gap = policy.estimates[evaluation.result.decide_by].difference
    assert gap is not None, "every policy is compared with the logging policy"
    return gap


def _question(names: list[str]) -> str:
    if len(names) == 1:
        return f"Should {names[0]} replace what is served today?"
    return f"Should one of these {len(names)} policies replace what is served today?"


def _subject(names: list[str], best: str) -> str:
    return best if len(names) == 1 else f"The best of {len(names)} policies, {best},"


def _unit(evaluation: LogEvaluation) -> str:
    reward = evaluation.log.get("reward")
    return f"per {PER:,} requests" + ("" if reward in (None, "reward") else f" (reward: {reward})")


def _signed(value: float, scale: float) -> str:
    text = per_requests(value, scale)
    return text if text.startswith("−") else f"+{text}"


def _more(value: float, scale: float) -> str:
    word = "more" if value >= 0.0 else "less"
    return f"{per_requests(abs(value), scale)} {word}"


def _between(gap: Gap, scale: float) -> str:
    """The interval of a difference: 'from 3 less to 21 more than'."""
    low, high = gap.simultaneous.low, gap.simultaneous.high
    if not any(c in "123456789" for c in per_requests(low, scale) + per_requests(high, scale)):
        return "as much as"
    if low < 0.0 < high:
        return f"from {_more(low, scale)} to {_more(high, scale)} than"
    near, far = sorted((abs(low), abs(high)))
    word = "more" if low >= 0.0 else "less"
    return f"{per_requests(near, scale)} to {per_requests(far, scale)} {word} than"


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.3g} %"


def _doubts(policy: PolicyEvaluation) -> list[Reason]:
    return [one for one in policy.verdict.reasons if one.kind == "doubt"]


def _unsure_propensities(causes: Collection[str | None]) -> bool:
    """Whether weights may be off their mean because few rows carry them."""
    return _PROPENSITIES in causes and not {_SUPPORT, _TAIL}.isdisjoint(causes)


def _cause(policy: PolicyEvaluation) -> str:
    if _unsure_propensities({_CAUSES.get(reason.code) for reason in _doubts(policy)}):
        return "too few rows show what it would show, or the logged probabilities are wrong"
    for reason in _doubts(policy):
        if reason.code in _CAUSES:
            return _CAUSES[reason.code]
    return "more data is needed"


def _remedy(evaluation: LogEvaluation, policy: PolicyEvaluation) -> str | None:
    """What would make an undecided answer certain."""
    if policy.verdict.decision in (GO, NO_GO):
        return None
    causes = {_CAUSES.get(reason.code) for reason in _doubts(policy)}
    if _NOT_HELD_OUT in causes:
        held_out = next(one for one in _doubts(policy) if one.code == "not_held_out")
        return f"Another log. {held_out.message[0].upper()}{held_out.message[1:]}."
    if _unsure_propensities(causes):
        return (
            "Check the logged probabilities. If they are right, log with more exploration: show "
            "the new policy's items to a small share of requests, with known probabilities."
        )
    if _PROPENSITIES in causes:
        return (
            "Mend the logged probabilities first: no number of rows makes up for wrong ones. "
            "The check of the log says which items are affected."
        )
    if _DRIFT in causes:
        return (
            "A newer log: evaluate on rows of the time in which the policy would be served, or on "
            "a longer log, whose forecast is narrower."
        )
    if _SUPPORT in causes or _TAIL in causes:
        return (
            "Log with more exploration: show the new policy's items to a small share of requests, "
            "with known probabilities. More rows of the same log help little."
        )
    gap, n = _gap(evaluation, policy), evaluation.result.n
    if gap.simultaneous.rows_needed is not None:
        return (
            "The log may lack rows of large weight or reward, so that its interval is of no useful "
            f"width. About {gap.simultaneous.rows_needed:,} rows like these would give one; this "
            f"log has {n:,}."
        )
    value = gap.estimate.value
    distance = abs(value)
    half = value - gap.simultaneous.low if value > 0.0 else gap.simultaneous.high - value
    if distance <= 0.0 or not math.isfinite(half / distance):
        return "The two policies earn the same on this log: no number of rows separates them."
    needed = n * (half / distance) ** 2
    if needed <= n:
        return f"A larger log: this one has {n:,} rows."
    if needed > _MOST_ROWS * n:
        return (
            f"Even {_MOST_ROWS} times this log of {n:,} rows would not separate the two policies, "
            "if they differ by as little as estimated."
        )
    unit = 10.0 ** max(0, math.floor(math.log10(needed)) - 1)
    rows = int(math.ceil(needed / unit) * unit)
    return (
        f"About {rows:,} rows like these would decide it, if the difference is as estimated. "
        f"This log has {n:,}."
    )


def _sensitivity(evaluation: LogEvaluation, policy: PolicyEvaluation) -> str | None:
    if not evaluation.result.propensities_estimated:
        return None
    text = (
        "This log has no recorded probabilities. They are estimates, and no interval here covers "
        "their error."
    )
    if policy.sensitivity is None:
        return text
    return (
        f"{text} The answer would change if they were wrong by a factor of "
        f"{policy.sensitivity:.2g} or more."
    )


def _over_time(evaluation: LogEvaluation, name: str, scale: float) -> tuple[str, ...]:
    """Sentences on change over time, with values per 1,000 requests."""
    time = evaluation.result.time
    if time is None:
        return (
            "The log has no timestamps (the schema key 'timestamp'): values by period and drift "
            "are not known.",
        )
    said = time.sentences(name, lambda value: per_requests(value, scale))
    return tuple(f"{one[0].upper()}{one[1:]}." for one in said)


def _simpler(evaluation: LogEvaluation, name: str, value: float, scale: float) -> str | None:
    """The best simple policy, where its estimate is above that of the policy `name`."""
    best = max(
        evaluation.baseline_values.items(), key=lambda one: one[1].estimate.value, default=None
    )
    if best is None or best[1].estimate.value <= value:
        return None
    low, high = (per_requests(end, scale) for end in (best[1].interval.low, best[1].interval.high))
    return (
        f"Something simpler may do better: '{best[0]}' for everybody would earn "
        f"{per_requests(best[1].estimate.value, scale)} per {PER:,} requests (plausibly {low} to "
        f"{high}), and {name} {per_requests(value, scale)}."
    )


def _command(evaluation: LogEvaluation, name: str, policy: PolicyEvaluation) -> str | None:
    run = evaluation.runs.get(name)
    if run is None:
        return None
    run = shlex.quote(run)
    if policy.verdict.decision == GO:
        return f"offtower export {run}"
    causes = {_CAUSES.get(reason.code) for reason in _doubts(policy)}
    if _PROPENSITIES in causes:
        catalogue = evaluation.log.get("catalogue", "CATALOGUE")
        path = shlex.quote(evaluation.log["path"])
        return f"offtower validate {path} --catalogue {shlex.quote(catalogue)}"
    if _NOT_HELD_OUT in causes:
        return f"offtower evaluate {run} --log LOG"
    if policy.verdict.decision == NO_GO:
        return f"offtower evaluate {run} --also temperature=2 --also greedy"
    return f"offtower search {run} --contexts CONTEXTS --sample --log served.parquet"
