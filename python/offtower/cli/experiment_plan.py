"""Plan an A/B test of a run's policy from its offline evaluation.

Reads the report of `offtower evaluate`: the variance of the log's rewards and the estimate of the
difference. Writes a plan that every reading of the test uses.

\b
Example:
  offtower experiment plan runs/mine
  offtower experiment plan runs/mine --requests 200000 --effect 0.002
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offtower.cli.common import AsJson, escape, messages, print_json, verb
from offtower.jsonable import finite


@verb
def experiment_plan(
    run: Annotated[
        Path, typer.Argument(help="Run directory with its report.json, or a report.", metavar="RUN")
    ],
    policy: Annotated[
        str | None, typer.Option(help="Policy of the report; needed where it has several.")
    ] = None,
    effect: Annotated[
        float | None,
        typer.Option(help="Gain per request to detect; the offline estimate without it."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Requests that are there for the test.", min=1)
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            help="Share of the requests for the new policy; without it the smallest whose test "
            "fits into --requests, else one half."
        ),
    ] = None,
    power: Annotated[
        float, typer.Option(help="Probability of a launch if the gain is the effect.")
    ] = 0.8,
    alpha: Annotated[
        float, typer.Option(help="Probability of a false launch over all readings.")
    ] = 0.05,
    margin: Annotated[float, typer.Option(help="Gain that a launch must exceed.")] = 0.0,
    out: Annotated[
        Path | None, typer.Option(help="Plan; experiment.json beside the report without it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    from offtower.experiment.plan import OfflineEvidence, describe, plan_experiment

    report = run / "report.json" if run.is_dir() else run
    plan = plan_experiment(
        OfflineEvidence.of_report(report, policy),
        share=share,
        effect=effect,
        units=requests,
        power=power,
        margin=margin,
        alpha=alpha,
    )
    path = out or report.with_name("experiment.json")
    plan.save(path)
    if as_json:
        print_json(finite({"plan": str(path), **plan.to_dict()}))
        return
    for line in describe(plan):
        messages().print(escape(line), soft_wrap=True)
    messages().print(f"plan: {escape(str(path))}", soft_wrap=True)
