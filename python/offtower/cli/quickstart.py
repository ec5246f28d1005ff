"""Run all steps from a log to a report, on data that comes with the installation.

Reads the Open Bandit Dataset sample inside the obp package, validates it, trains two-tower policies
by auto, regression, ips and dr, evaluates each on the held-out part, repeats this on a simulated
log with known truth, and writes a report. Needs the extra 'obp'.

\b
Example:
  offtower quickstart --out runs/quickstart
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offtower.cli.common import AsJson, DrawnProgress, messages, print_json, verb
from offtower.jsonable import finite


@verb
def quickstart(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/quickstart"),
    as_json: AsJson = False,
) -> None:
    from offtower.cli.tables import evaluation_table
    from offtower.quickstart import run_quickstart

    console = messages()
    result = run_quickstart(out, DrawnProgress(), lambda text: console.print(text))
    if as_json:
        print_json(
            finite(
                {
                    "report": str(result.report),
                    "logs": [evaluation.to_dict() for evaluation in result.evaluations],
                }
            )
        )
        return
    for evaluation in result.evaluations:
        console.print()
        console.print(evaluation_table(evaluation))
    console.print(f"\nreport: {result.report}")
