"""The gate's verdicts and their reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offtower.errors import OfftowerError
from offtower.evaluation.decision.gate import (
    EXIT_CODES,
    GO,
    NO_GO,
    NOT_ENOUGH,
    Evidence,
    GateOptions,
    Verdict,
    best_exit_code,
    decide,
)
from offtower.evaluation.decision.support import support_probe
from offtower.evaluation.decision.weights import WeightDiagnostics
from offtower.evaluation.intervals import Interval
from offtower.evaluation.intervals.statistics import Estimate

WEIGHTS = WeightDiagnostics(
    n=10_000,
    effective_sample_size=2000.0,
    effective_share=0.2,
    mean=1.0,
    mean_std_error=0.01,
    mean_z=0.0,
    max=20.0,
    top_share=0.02,
    pareto_k=0.3,
    zero_share=0.0,
)
LOOSE = Interval(-1.0, 1.0, 0.95, "log_smoothing")


def evidence(low: float, high: float, **changes: object) -> Evidence:
    middle = 0.5 * (low + high)
    base = Evidence(
        Estimate(middle, 0.25 * (high - low), 10_000),
        Interval(low, high, 0.95, "normal"),
        WEIGHTS,
        LOOSE,
        None,
        "snips",
        True,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def codes(verdict: Verdict, kind: str) -> list[str]:
    return [reason.code for reason in verdict.reasons if reason.kind == kind]


@pytest.mark.parametrize(
    ("low", "high", "margin", "decision"),
    [
        (0.01, 0.05, 0.0, GO),
        (0.01, 0.05, 0.02, NOT_ENOUGH),
        (-0.05, -0.01, 0.0, NO_GO),
        (0.01, 0.05, 0.06, NO_GO),
        (-0.01, 0.05, 0.0, NOT_ENOUGH),
        (0.0, 0.05, 0.0, NOT_ENOUGH),
    ],
)
def test_the_interval_decides(low: float, high: float, margin: float, decision: str) -> None:
    verdict = decide(evidence(low, high), GateOptions(margin=margin))
    assert verdict.decision == decision and verdict.exit_code == EXIT_CODES[decision]
    assert codes(verdict, "evidence") == (["interval"] if decision != NOT_ENOUGH else [])


def test_the_number_of_rows_that_would_decide() -> None:
    """Half-width 0.03 around 0.02: (0.03 / 0.02)^2 * 10,000 rows."""
    message = decide(evidence(-0.01, 0.05)).reasons[0].message
    assert "about 23,000 rows would show it" in message and "contains 0" in message


DOUBTS = {
    "too_few_rows": {"weights": replace(WEIGHTS, n=50)},
    "effective_sample_size": {"weights": replace(WEIGHTS, effective_sample_size=30.0)},
    "weight_tail": {"weights": replace(WEIGHTS, pareto_k=0.9)},
    "mean_weight": {"weights": replace(WEIGHTS, mean=0.8, mean_z=-20.0)},
    "no_variation": {"difference": Estimate(0.03, 0.0, 10_000)},
    "balance": {"weights": replace(WEIGHTS, balance=0.02, balance_z=9.0)},
    "too_few_users": {"users": 20},
    "support": {"support": support_probe([0.0, 0.1, 0.1])},
    "hidden_support": {"support": support_probe([1e-9, 0.1], [0.5, 0.2], num_rows=10_000)},
}


@pytest.mark.parametrize("code", DOUBTS)
@pytest.mark.parametrize(("low", "high"), [(0.01, 0.05), (-0.05, -0.01), (-0.05, 0.05)])
def test_each_doubt_keeps_a_verdict_back(code: str, low: float, high: float) -> None:
    verdict = decide(evidence(low, high, **DOUBTS[code]))
    assert verdict.decision == NOT_ENOUGH
    assert code in codes(verdict, "doubt")
    straddles = low < 0.0 < high
    assert ("interval_holds_margin" in codes(verdict, "doubt")) == straddles


@pytest.mark.parametrize("code", ["weight_tail", "support", "hidden_support"])
def test_the_guaranteed_interval_needs_no_light_tail(code: str) -> None:
    sure = Interval(0.01, 0.5, 0.95, "log_smoothing")
    verdict = decide(evidence(-0.1, 0.2, guaranteed=sure, **DOUBTS[code]))
    assert verdict.decision == GO
    assert codes(verdict, "evidence") == ["guaranteed_interval"]
    assert code in codes(verdict, "note")


def test_the_guaranteed_interval_can_say_no() -> None:
    sure = Interval(-0.5, -0.01, 0.95, "log_smoothing")
    assert decide(evidence(-0.1, 0.2, guaranteed=sure)).decision == NO_GO


def test_wrong_propensities_prevent_a_decision() -> None:
    sure = Interval(0.01, 0.5, 0.95, "log_smoothing")
    verdict = decide(evidence(0.1, 0.2, guaranteed=sure, **DOUBTS["mean_weight"]))
    assert verdict.decision == NOT_ENOUGH
    assert "20.0 standard errors from 1" in verdict.reasons[0].message
    verdict = decide(evidence(0.1, 0.2, guaranteed=sure, mean_weight_low=1.2))
    assert verdict.decision == NOT_ENOUGH and "at least 1.2" in verdict.reasons[0].message


def test_a_small_offset_of_the_mean_weight_is_tolerated() -> None:
    weights = replace(WEIGHTS, mean=1.01, mean_z=10.0)
    assert decide(evidence(0.01, 0.05, weights=weights)).decision == GO


def test_an_imbalance_too_small_to_matter_is_tolerated() -> None:
    weights = replace(WEIGHTS, balance=0.001, balance_z=10.0)
    assert decide(evidence(0.01, 0.05, weights=weights)).decision == GO


def test_estimated_propensities_are_said_loudly() -> None:
    sure = Interval(0.01, 0.5, 0.95, "log_smoothing")
    verdict = decide(evidence(-0.1, 0.2, guaranteed=sure, propensities_estimated=True))
    assert verdict.decision == NOT_ENOUGH
    assert any("THE PROPENSITIES ARE ESTIMATES" in r.message for r in verdict.reasons)


def test_a_biased_estimator_is_noted() -> None:
    verdict = decide(evidence(0.01, 0.05, consistent=False, estimator="dm"))
    assert codes(verdict, "note") == ["biased_estimator"]


def test_rows_by_user_have_no_guaranteed_interval() -> None:
    assert decide(evidence(0.01, 0.05, guaranteed=None)).decision == GO


def test_the_best_of_several() -> None:
    go, no, maybe = (Verdict(d, ()) for d in (GO, NO_GO, NOT_ENOUGH))
    assert best_exit_code([no, maybe, go]) == 0
    assert best_exit_code([no, maybe]) == 3
    assert best_exit_code([no, no]) == 1
    assert EXIT_CODES == {"go": 0, "no-go": 1, "not enough evidence": 3}


def test_options_are_checked() -> None:
    with pytest.raises(OfftowerError, match="margin must be a number"):
        GateOptions(margin=float("nan"))


def test_json() -> None:
    content = decide(evidence(0.01, 0.05)).to_dict()
    assert content["decision"] == "go" and content["exit_code"] == 0
    assert set(content["reasons"][0]) == {"code", "message", "kind"}
