"""Choose the temperature and the uniform share with which a run's policy is served.

Value, effective sample size and exploration of every setting are estimated on a log. The
recommended one is written to the section serving of the run; export again to serve it.
Exit code 0: recommended. 3: no setting has a reliable estimate. 2: refused.

\b
Example:
  offtower tune serving runs/mine
  offtower tune serving runs/mine --log logs/mine/validation --max-loss 0.05
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offtower.cli.cluster import IN_PROCESS, RayOptions
from offtower.cli.common import (
    AsJson,
    DrawnProgress,
    TrustCode,
    escape,
    messages,
    print_json,
    verb,
)
from offtower.jsonable import finite


@verb
def tune_serving(
    run: Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")],
    log: Annotated[
        str | None,
        typer.Option(help="Log to tune on; data.validation of the run without it, else data.test."),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="Temperature of the grid; may be repeated."),
    ] = None,
    uniform: Annotated[
        list[float] | None,
        typer.Option("--uniform", help="Uniform share of the grid; may be repeated."),
    ] = None,
    keep_rows: Annotated[
        float | None,
        typer.Option(
            "--keep-ess",
            metavar="ROWS",
            help="Effective sample size to keep; the gate's requirement without it.",
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            "--max-loss",
            metavar="SHARE",
            help="Explore as much as costs at most this share of the best value, such as 0.05.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the report only, not the run's configuration.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="HTML file; serving.html of the run without it.")
    ] = None,
    trust_code: TrustCode = None,
    ray: RayOptions = IN_PROCESS,
    as_json: AsJson = False,
) -> None:
    from offtower.cli.tables import frontier_table
    from offtower.evaluation.frontier import (
        TEMPERATURES,
        UNIFORM,
        FrontierBounds,
        apply_recommendation,
        serving_frontier,
    )
    from offtower.evaluation.report.frontier import write_frontier

    bounds = FrontierBounds(keep_rows, max_loss)
    with ray.execution(DrawnProgress()) as execution:
        found = serving_frontier(
            run,
            log=log,
            temperatures=temperature or TEMPERATURES,
            uniform=uniform or UNIFORM,
            bounds=bounds,
            execution=execution,
        )
    path = write_frontier(
        report or run / "serving.html", found, command=f"offtower tune serving {run}"
    )
    best = found.recommended
    written = best is not None and not dry_run
    if best is not None and not dry_run:
        apply_recommendation(run, found)
    if as_json:
        print_json(finite({"report": str(path), "written": written, **found.to_dict()}))
    else:
        console = messages()
        console.print(frontier_table(found))
        for note in found.evaluation.notes:
            console.print(f"[yellow]note[/]: {escape(note)}", soft_wrap=True)
        console.print(escape(found.reason), soft_wrap=True)
        if written:
            console.print(
                f"written to {escape(str(run / 'config.yaml'))}; evaluate it on a log that it was "
                "not chosen on, and export again to serve it",
                soft_wrap=True,
            )
        console.print(f"report: {path}")
    raise typer.Exit(0 if best is not None else 3)
