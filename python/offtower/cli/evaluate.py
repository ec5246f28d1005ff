"""Evaluate trained policies, as they are served, off-policy on a held-out log, against the policy
that logged it.

Exit code 0: go. 1: no-go. 3: not enough evidence. 2: refused. With several runs the code is that of
the best verdict, without the rows of --also; --exit-zero makes it 0 unless refused. --set changes
the section `evaluation`: evaluation.confidence=0.9.

\b
Example:
  offtower evaluate runs/mine --log logs/mine/test
  offtower evaluate runs/mine --also greedy --also temperature=0.5
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offtower.cli.cluster import IN_PROCESS, RayOptions
from offtower.cli.common import (
    AsJson,
    DrawnProgress,
    Overrides,
    TrustCode,
    escape,
    messages,
    print_json,
    verb,
)
from offtower.jsonable import finite


@verb
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", metavar="RUN...")],
    log: Annotated[
        str | None, typer.Option(help="Log to evaluate on; the runs' data.test without it.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="HTML file; report.html of the first run without it.")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="Choose the estimator by a selector: paired, pasif, heuristic, ocv, slope, or all."
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="SERVING",
            help="Also evaluate the policies served otherwise: greedy (the k best items), or "
            "settings such as temperature=0.5,uniform=0.1; may be repeated.",
        ),
    ] = None,
    retrieval: Annotated[
        list[int] | None,
        typer.Option(
            "--retrieval",
            metavar="K",
            help="Also recall@K, NDCG@K and coverage of the runs' exports; may be repeated.",
        ),
    ] = None,
    overrides: Overrides = None,
    trust_code: TrustCode = None,
    exit_zero: Annotated[
        bool,
        typer.Option(
            "--exit-zero",
            help="Exit with 0 for every verdict, since schedulers take other codes for failures.",
        ),
    ] = False,
    ray: RayOptions = IN_PROCESS,
    as_json: AsJson = False,
) -> None:
    from offtower.cli.tables import (
        evaluation_table,
        position_table,
        retrieval_table,
        rewards_table,
        selection_table,
    )
    from offtower.evaluation.exports import add_retrieval_quality, open_exports
    from offtower.evaluation.report import write_report
    from offtower.evaluation.run import check_log, evaluate_runs

    check_log(runs, log, overrides or [])
    exports = open_exports(runs, retrieval) if retrieval else []
    progress = DrawnProgress()
    with ray.mapper(progress) as mapper:
        evaluation = evaluate_runs(
            runs,
            log=log,
            overrides=overrides or [],
            select=select,
            also=also or [],
            progress=progress,
            mapper=mapper,
        )
    if retrieval:
        # Exports are memory-mapped, so this runs in this process, after the workers.
        add_retrieval_quality(evaluation, runs, exports, retrieval, progress)
    path = write_report(
        report or runs[0] / "report.html",
        [evaluation],
        title=f"Evaluation of {', '.join(run.name for run in runs)}",
        command="offtower evaluate " + " ".join(str(run) for run in runs),
    )
    if as_json:
        print_json(finite({"report": str(path), **evaluation.to_dict()}))
    else:
        console = messages()
        console.print(evaluation_table(evaluation))
        positions = position_table(evaluation)
        if positions is not None:
            console.print(positions)
        if evaluation.result.logging_rewards:
            console.print(rewards_table(evaluation))
        if evaluation.retrieval:
            console.print(retrieval_table(evaluation))
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
        console.print(f"report: {path}")
    raise typer.Exit(0 if exit_zero else evaluation.exit_code)
