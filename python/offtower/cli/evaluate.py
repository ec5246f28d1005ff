"""Evaluate trained policies, as they are served, off-policy on a held-out log, against the policy
that logged it.

Exit code 0: go. 1: no-go. 3: not enough evidence. 2: refused. With several runs the code is that of
the best verdict, without the rows of --also; --exit-zero makes it 0 unless refused. --set changes
the section `evaluation`: evaluation.confidence=0.9.

The log's ledger records each evaluation, and later ones need stronger evidence. A log that a policy
was trained, chosen or tuned on never gives a go. `offtower log history` lists the ledger.

\b
Example:
  offtower evaluate runs/mine --log logs/mine/test
  offtower evaluate runs/mine --also greedy --also temperature=0.5
  offtower evaluate --policy-column p_new --log logs/mine/test --catalogue logs/mine/catalogue
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offtower.cli.cluster import IN_PROCESS, RayOptions
from offtower.cli.common import (
    AsJson,
    DrawnProgress,
    Overrides,
    TrustCode,
    print_json,
    verb,
)
from offtower.errors import ConfigError
from offtower.execution import Execution
from offtower.jsonable import finite

if TYPE_CHECKING:
    from offtower.evaluation.run import LogEvaluation


@verb
def evaluate(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run directories.", metavar="RUN...")
    ] = None,
    log: Annotated[
        str | None, typer.Option(help="Log to evaluate on; the runs' data.test without it.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="HTML file; report.html of the first run without it. Missing folders are created."
        ),
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
    fresh: Annotated[
        str | None,
        typer.Option(
            "--fresh",
            metavar="WHY",
            help="Declare a new question to this log, and say why: earlier looks at it are not "
            "counted, and the report says so.",
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
    policy_column: Annotated[
        list[str] | None,
        typer.Option(
            "--policy-column",
            metavar="COLUMN[,Q,EXPECTED]",
            help="Instead of runs: a column of the log with another policy's probability of the "
            "logged item, and optionally those of a reward model; may be repeated.",
        ),
    ] = None,
    embeddings: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--embeddings",
            metavar="CONTEXTS ITEMS",
            help="Instead of runs: .npy files with another model's embeddings of the log's rows "
            "and of the catalogue's items.",
        ),
    ] = None,
    catalogue: Annotated[
        str | None, typer.Option(help="Directory of the catalogue, without runs.")
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
    from offtower.cli.tables import print_evaluation
    from offtower.evaluation.report import write_report

    others = _Others(policy_column or [], embeddings, catalogue)
    others.check(runs or [], log, retrieval)
    if fresh is not None and not fresh.strip():
        raise ConfigError("--fresh needs a reason: say why earlier looks at the log do not count")
    if report is not None:
        _make_folder_of(report)
    options = _Options(log, overrides or [], select, also or [], fresh)
    progress = DrawnProgress()
    if runs:
        evaluation = _of_runs(runs, options, retrieval or [], ray, progress)
    else:
        with ray.execution(progress) as execution:
            evaluation = others.evaluate(options, execution)
    names = [run.absolute().name for run in runs or []] or list(evaluation.result.policies)
    path = write_report(
        report or (runs[0] / "report.html" if runs else Path("report.html")),
        [evaluation],
        title=f"Evaluation of {', '.join(names)}",
        command="offtower evaluate " + " ".join(map(str, runs or others.arguments(log))),
    )
    if as_json:
        print_json(finite({"report": str(path), **evaluation.to_dict()}))
    else:
        print_evaluation(evaluation, path)
    raise typer.Exit(0 if exit_zero else evaluation.exit_code)


def _make_folder_of(report: Path) -> None:
    """Create the report's folder before anything is evaluated."""
    if report.is_dir():
        raise ConfigError(f"--report names the folder '{report}': name the HTML file in it")
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--report: the folder '{report.parent}' cannot be created ({error}); name another"
        ) from None


@dataclass(frozen=True)
class _Options:
    """The options for policies of any origin."""

    log: str | None
    overrides: list[str]
    select: str | None
    also: list[str]
    fresh: str | None


def _of_runs(
    runs: list[Path],
    options: _Options,
    retrieval: list[int],
    ray: RayOptions,
    progress: DrawnProgress,
) -> LogEvaluation:
    from offtower.evaluation.exports import add_retrieval_quality, open_exports
    from offtower.evaluation.run import check_log, evaluate_runs

    check_log(runs, options.log, options.overrides)
    exports = open_exports(runs, retrieval) if retrieval else []
    with ray.execution(progress) as execution:
        evaluation = evaluate_runs(
            runs,
            log=options.log,
            overrides=options.overrides,
            select=options.select,
            also=options.also,
            fresh=options.fresh,
            execution=execution,
        )
    if retrieval:
        # Exports are memory-mapped, so this runs in this process, after the workers.
        add_retrieval_quality(evaluation, runs, exports, retrieval, progress)
    return evaluation


@dataclass(frozen=True)
class _Others:
    """The options that name policies which offtower did not train."""

    columns: list[str]
    embeddings: tuple[Path, Path] | None
    catalogue: str | None

    def check(self, runs: list[Path], log: str | None, retrieval: list[int] | None) -> None:
        ways = [bool(runs), bool(self.columns), self.embeddings is not None]
        if sum(ways) != 1:
            raise ConfigError(
                "name what to evaluate: run directories, or --policy-column, or --embeddings, and "
                "one of these only"
            )
        if not runs and (log is None or self.catalogue is None):
            raise ConfigError("policies of others need --log and --catalogue")
        if runs and self.catalogue is not None:
            raise ConfigError("runs name their catalogue: leave out --catalogue")
        if not runs and retrieval:
            raise ConfigError("--retrieval measures the exports of runs")

    def evaluate(self, options: _Options, execution: Execution) -> LogEvaluation:
        from offtower.evaluation.external import (
            evaluate_columns,
            evaluate_embeddings,
            parse_columns,
        )

        assert options.log is not None and self.catalogue is not None, "checked before"
        if self.embeddings is not None:
            return evaluate_embeddings(
                options.log,
                self.catalogue,
                *self.embeddings,
                also=options.also,
                overrides=options.overrides,
                fresh=options.fresh,
                select=options.select,
                execution=execution,
            )
        if options.also:
            raise ConfigError("--also needs scores of all items: runs, or --embeddings")
        return evaluate_columns(
            options.log,
            self.catalogue,
            [parse_columns(text) for text in self.columns],
            overrides=options.overrides,
            fresh=options.fresh,
            select=options.select,
            execution=execution,
        )

    def arguments(self, log: str | None) -> list[str]:
        """As typed, for the report."""
        typed = [f"--policy-column {one}" for one in self.columns]
        if self.embeddings is not None:
            typed.append(f"--embeddings {self.embeddings[0]} {self.embeddings[1]}")
        return [*typed, f"--log {log}", f"--catalogue {self.catalogue}"]
