"""Tables that more than one verb prints."""

from __future__ import annotations

from rich.table import Table

from offtower.evaluation.intervals import Interval
from offtower.evaluation.run import LogEvaluation

_COLOUR = {"go": "green", "no-go": "red", "not enough evidence": "yellow"}


def evaluation_table(evaluation: LogEvaluation) -> Table:
    """One row a policy: estimates with intervals, the truth where it is known, the verdict."""
    result = evaluation.result
    first = next(iter(result.policies.values()))
    table = Table(
        title=f"{evaluation.title}: {result.n:,} held-out rows, {evaluation.log['items']:,} items",
        title_justify="left",
        caption=f"value [{result.confidence:.0%} interval]; verdict by {result.decide_by}",
        caption_justify="left",
    )
    table.add_column("policy")
    for estimate in first.estimates.values():
        table.add_column(estimate.label, justify="right")
    for name in _truth_columns(evaluation):
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("ESS", justify="right")
    table.add_column("verdict")
    truth_columns = _truth_columns(evaluation)
    logging = result.logging
    table.add_row(
        "logging policy",
        *[_value(logging.estimate.value, logging.interval)],
        *["" for _ in list(first.estimates)[1:]],
        *["" for _ in truth_columns],
        f"{result.n:,}",
        "",
    )
    for name, policy in result.policies.items():
        truth = evaluation.truth.get(name, {})
        decision = policy.verdict.decision
        table.add_row(
            evaluation.objectives[name],
            *[_value(e.estimate.value, e.interval) for e in policy.estimates.values()],
            *[f"{truth[column]:.4f}" for column in truth_columns],
            f"{policy.weights.effective_sample_size:,.0f}",
            f"[{_COLOUR[decision]}]{decision}[/]",
        )
    return table


def _truth_columns(evaluation: LogEvaluation) -> list[str]:
    return list(next(iter(evaluation.truth.values()), {}))


def _value(value: float, interval: Interval) -> str:
    return f"{value:.4f} \\[{interval.low:.4f}, {interval.high:.4f}]"
