"""Check every row of a log, and what the log must satisfy on average.

Exit code 0: no error found. 1: the log has errors. 2: it cannot be read.

\b
Example:
  offtower validate logs/mine/log
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from offtower.cli.cluster import IN_PROCESS, RayOptions
from offtower.cli.common import AsJson, DrawnProgress, messages, print_json, verb
from offtower.cli.findings import print_findings
from offtower.jsonable import finite


@verb
def validate(
    log: Annotated[str, typer.Argument(help="Directory of the log, or its address (s3://...).")],
    catalogue: Annotated[
        str | None,
        typer.Option(help="Directory or address; by default 'catalogue' beside the log."),
    ] = None,
    split_from: Annotated[
        str | None,
        typer.Option(help="Another part of the same split: users in both are counted."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its sha256 first.")
    ] = False,
    ray: RayOptions = IN_PROCESS,
    as_json: AsJson = False,
) -> None:
    from offtower.data import Catalogue, ParquetLog, validate_log
    from offtower.data.findings.users import users_in_both
    from offtower.data.location import Location
    from offtower.data.parquet import verify_files

    if catalogue is None:
        catalogue = str(Location.of(log).absolute().parent / "catalogue")
    if verify:
        files = verify_files(log, "log") + verify_files(catalogue, "catalogue")
        messages().print(f"{files} files match their checksums")
    opened = ParquetLog.open(log)
    items = Catalogue.open(catalogue, log_schema=opened.schema)
    with ray.execution(DrawnProgress()) as execution:
        report = validate_log(opened, items, execution=execution)
    if split_from is not None:
        parts = {split_from: ParquetLog.open(split_from), log: opened}
        report = replace(report, findings=(*report.findings, *users_in_both(parts)))
    if as_json:
        print_json(finite(report.to_dict()))
    else:
        console = messages()
        print_findings(report.findings)
        console.print("[green]ok[/]" if report.ok else "[bold red]the log has errors[/]")
    if not report.ok:
        raise typer.Exit(1)
