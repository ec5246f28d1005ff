"""Tables that several verbs print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from offtower.cli.common import messages
from offtower.evaluation.frontier import ServingFrontier
from offtower.evaluation.intervals import Interval
from offtower.evaluation.report.answer import answer_of
from offtower.evaluation.run import LogEvaluation
from offtower.evaluation.selection import SelectionComparison
from offtower.monitoring import Day, MonitorReport

_TRUTH = {"true_value": "truth", "true_value_greedy": "greedy"}
_DAYS = 14
"""Days of a monitoring that are printed, the last."""
_COLOR = {"go": "green", "no-go": "red", "not enough evidence": "yellow"}


def print_evaluation(evaluation: LogEvaluation, report: Path) -> None:
    """Print the tables, the notes and the answer of an evaluation."""
    console = messages()
    console.print(evaluation_table(evaluation))
    positions = position_table(evaluation)
    if positions is not None:
        console.print(positions)
    if evaluation.result.logging_rewards:
        console.print(rewards_table(evaluation))
    if evaluation.retrieval:
        console.print(retrieval_table(evaluation))
    looks = evaluation.result.looks
    if looks is not None:
        again = " (evaluated in this way before: nothing is spent)" if looks.repeated else ""
        console.print(escape(looks.sentence) + again, soft_wrap=True)
    for note in evaluation.notes:
        console.print(f"[yellow]note[/]: {escape(note)}", soft_wrap=True)
    for name, found in evaluation.selection.items():
        console.print(selection_table(name, found))
        console.print(escape(found.verdict), soft_wrap=True)
        for method, text in found.disagreements.items():
            console.print(f"  [bold]{method}[/] {escape(text)}", soft_wrap=True)
        for method, text in found.remarks:
            console.print(f"  [dim]{method}: {escape(text)}[/]", soft_wrap=True)
        for method, reason in found.failed.items():
            console.print(f"  [dim]{method} could not run: {escape(reason)}[/]", soft_wrap=True)
    answer = answer_of(evaluation)
    for sentence in answer.over_time if evaluation.result.time is not None else ():
        console.print(f"[cyan]time[/]: {escape(sentence)}", soft_wrap=True)
    console.print(f"[bold]{escape(answer.headline)}.[/] {escape(answer.sentence)}", soft_wrap=True)
    if answer.command is not None:
        console.print(f"next: {escape(answer.command)}", soft_wrap=True)
    console.print(f"report: {report}")


def print_monitoring(report: MonitorReport) -> None:
    """Print the checks, the last days, what is breached, and notes."""
    console = messages()
    console.print(checks_table(report))
    console.print(days_table(report.days[-_DAYS:]))
    for note in report.notes:
        console.print(f"[yellow]note[/]: {escape(note)}", soft_wrap=True)
    for one in report.breached:
        console.print(f"[bold red]breached[/]: {escape(one.text)}", soft_wrap=True)
    if not report.breached:
        console.print("[green]ok[/]: no threshold is breached")


def checks_table(report: MonitorReport) -> Table:
    """One row per check."""
    table = _table(
        f"{report.log}: {report.rows:,} rows, {report.units:,} rounds",
        caption=f"bounds hold for all checks at once with confidence {1.0 - report.alpha:g}",
    )
    for column in ("check", "of"):
        table.add_column(column, overflow="fold")
    for column in ("value", "bounds", "threshold"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for one in report.checks:
        table.add_row(
            one.name.replace("_", " "),
            escape(one.subject),
            f"{one.value:.4g}",
            _ends(one.low, one.high),
            "" if one.threshold is None else f"{one.threshold:.4g}",
            "[bold red]breached[/]" if one.breached else "[green]ok[/]",
        )
    return table


def days_table(days: Sequence[Day]) -> Table:
    """One row per day."""
    table = _table("by day", caption="bounds hold for all days and readings of the log at once")
    table.add_column("day", no_wrap=True)
    for column in ("rows", "mean reward", "bounds", "mean weight", "weight bounds"):
        table.add_column(column, justify="right", no_wrap=True)
    for day in days:
        table.add_row(
            day.name,
            f"{day.rows:,}",
            f"{day.value:.4f}",
            _ends(day.value_low, day.value_high),
            "" if day.weight is None else f"{day.weight:.4g}",
            _ends(day.weight_low, day.weight_high),
        )
    return table


def _ends(low: float | None, high: float | None) -> str:
    """Bounds as text; empty without any."""
    if low is None:
        return ""
    return f"{low:.4g} or more" if high is None else f"{low:.4g} to {high:.4g}"


def evaluation_table(evaluation: LogEvaluation) -> Table:
    """One row per policy: estimates with intervals, the truth where it is known, the verdict."""
    result = evaluation.result
    first = next(iter(result.policies.values()))
    unit = "rounds" if first.positions else "rows"
    table = _table(
        f"{evaluation.title}: {result.n:,} held-out {unit}, {evaluation.log['items']:,} items",
        caption=f"± half of the {result.confidence:.0%} interval; verdict by {result.decide_by}",
    )
    table.add_column("policy", overflow="fold")
    for estimate in first.estimates.values():
        table.add_column(estimate.name, justify="right", no_wrap=True)
    for name in _truth_columns(evaluation):
        table.add_column(_TRUTH.get(name, name), justify="right")
    table.add_column("ESS", justify="right", no_wrap=True)
    table.add_column("verdict")
    truth_columns = _truth_columns(evaluation)
    logging = result.logging
    table.add_row(
        "logging",
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
            escape(name),
            *[_value(e.estimate.value, e.interval) for e in policy.estimates.values()],
            *[f"{truth[column]:.4f}" if column in truth else "" for column in truth_columns],
            f"{policy.weights.effective_sample_size:,.0f}",
            f"[{_COLOR[decision]}]{decision}[/]",
        )
    return table


def frontier_table(found: ServingFrontier) -> Table:
    """One row per way to serve the policy; the recommended one is marked."""
    result = found.evaluation.result
    table = _table(
        f"ways to serve the policy, on {result.n:,} rows of {found.evaluation.title}",
        caption=f"value by {result.decide_by} ± half of the interval of all settings at once; "
        "perplexity: equally likely items that explore as much",
    )
    table.add_column("serving", no_wrap=True)
    for column in ("value", "ESS", "perplexity"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for point in found.points:
        chosen = point is found.recommended
        table.add_row(
            escape(point.serving.text),
            f"{point.value:.4f} ±{(point.high - point.low) / 2:.4f}".replace("±0.", "±."),
            f"{point.effective_sample_size:,.0f}",
            f"{point.perplexity:,.1f}",
            "[green]recommended[/]" if chosen else "" if point.obstacle is None else "not reliable",
        )
    return table


def position_table(evaluation: LogEvaluation) -> Table | None:
    """Mean weight of each position of the slates, one row per policy; None without slates."""
    policies = evaluation.result.policies
    positions = next(iter(policies.values())).positions
    if not positions:
        return None
    table = _table("mean weight by position", caption="1 is expected; ± is one standard error")
    table.add_column("policy", no_wrap=True)
    for one in positions:
        table.add_column(str(one.position), justify="right", no_wrap=True)
    for name, policy in policies.items():
        cells = [
            f"{one.mean:.3f}" + ("" if one.std_error is None else f" ±{one.std_error:.3f}")
            for one in policy.positions
        ]
        table.add_row(escape(name), *cells)
    return table


def rewards_table(evaluation: LogEvaluation) -> Table:
    """One row per policy and named reward: its value against the logging policy's."""
    result = evaluation.result
    first = next(iter(next(iter(result.policies.values())).rewards.values()))
    table = _table(
        "each reward by itself",
        caption=f"by {first.name}; ± half of the {result.confidence:.0%} interval",
    )
    for column in ("policy", "reward"):
        table.add_column(column, no_wrap=True)
    for column in ("value", "logging", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, policy in result.policies.items():
        for reward, found in policy.rewards.items():
            logging = result.logging_rewards[reward]
            assert found.difference is not None
            gap = found.difference
            table.add_row(
                escape(name),
                escape(reward),
                _value(found.estimate.value, found.interval),
                _value(logging.estimate.value, logging.interval),
                _value(gap.estimate.value, gap.interval),
            )
    return table


def retrieval_table(evaluation: LogEvaluation) -> Table:
    """One row per policy and k: retrieval quality of its export."""
    table = _table(
        "retrieval from the whole catalogue",
        caption="rewarded rows weighted by reward / pscore; ± is one standard error",
    )
    table.add_column("policy", no_wrap=True)
    for column in ("k", "recall", "NDCG", "coverage", "index finds", "value of the first"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, found in evaluation.retrieval.items():
        for one in found:
            index = one["index_recall"]
            table.add_row(
                escape(name),
                f"{one['k']:,}",
                f"{one['recall']:.4f} ±{one['recall_error']:.4f}",
                f"{one['ndcg']:.4f} ±{one['ndcg_error']:.4f}",
                f"{one['coverage']:.2%}",
                "exact" if index is None else f"{index:.4f}",
                f"{one['value_first']:.4f} ±{one['value_first_error']:.4f}",
            )
    return table


def selection_table(name: str, found: SelectionComparison) -> Table:
    """One row per selector: its choice, and the candidates tied with it."""
    table = _table(f"{name}: choice of the estimator")
    for column in ("selector", "chooses", "value", "root MSE", "statistically tied"):
        table.add_column(column, justify="right" if column in ("value", "root MSE") else "left")
    for method, result in found.results.items():
        mse = result.best.mse
        tied = result.tied[:3]
        more = f" and {len(result.tied) - 3} more" if len(result.tied) > 3 else ""
        table.add_row(
            f"{method} *" if method == found.recommended else method,
            escape(result.best.name),
            f"{result.best.value:.4f}",
            f"{mse**0.5:.4f}" if mse >= 0 else "-",
            escape(", ".join(tied) + more),
        )
    return table


def _table(title: str, caption: str | None = None) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        caption=caption,
        caption_justify="left",
    )


def _truth_columns(evaluation: LogEvaluation) -> list[str]:
    return list(next(iter(evaluation.truth.values()), {}))


def _value(value: float, interval: Interval) -> str:
    """Format a value and the half width of its interval."""
    half = (interval.high - interval.low) / 2
    return f"{value:.4f} ±{half:.4f}".replace("±0.", "±.")
