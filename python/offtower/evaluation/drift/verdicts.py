"""What drift does to a verdict."""

from __future__ import annotations

from dataclasses import replace

from offtower.evaluation.decision.gate import GO, NO_GO, NOT_ENOUGH, Reason, Verdict
from offtower.evaluation.drift.result import TimeResult


def qualify(verdict: Verdict, time: TimeResult, policy: str, margin: float) -> Verdict:
    """The verdict, given how the policy's values moved.

    Where the difference to the logging policy drifts, the value over the log is one of the past: a
    verdict stands only where the forecast of the difference lies on its side of the margin too.
    Mean weights that drift are a doubt about the propensities.
    """
    found = time.policies.get(policy)
    if found is None or verdict.decision == NOT_ENOUGH:
        return verdict
    reasons: list[Reason] = []
    if found.weight.drifts:
        text = f"{time.change(found.weight)}: wrong propensities in some periods"
        reasons.append(Reason("weight_drift", text, "doubt"))
    if found.difference.drifts:
        reasons.append(_drift(verdict, time, policy, margin))
    if any(one.kind == "doubt" for one in reasons):
        softened = [
            replace(one, kind="note") if one.kind == "evidence" else one for one in verdict.reasons
        ]
        return Verdict(NOT_ENOUGH, (*reasons, *softened))
    return Verdict(verdict.decision, (*verdict.reasons, *reasons))


def _drift(verdict: Verdict, time: TimeResult, policy: str, margin: float) -> Reason:
    series = time.policies[policy].difference
    text, forecast = time.change(series), series.forecast
    if forecast is None or forecast.simultaneous is None:
        why = time.reason or "there is no estimate for a later period"
        return Reason("drift", f"{text}, so that the past is no guide; {why}", "doubt")
    interval = forecast.simultaneous
    text += (
        f"; for {forecast.name} it is {forecast.value:.4g} [{interval.low:.4g}, "
        f"{interval.high:.4g}] with confidence {interval.confidence:.4g}"
    )
    same = {GO: interval.low > margin, NO_GO: interval.high < margin}
    if same[verdict.decision]:
        return Reason("drift", f"{text}, on the same side of {margin:g}", "note")
    return Reason("drift", f"{text}, which does not confirm the value over the log", "doubt")
