"""Convert files into a checked log and catalogue.

SOURCE is a file or a folder (CSV, TSV, JSON Lines, Parquet, Arrow), local or in a store
(s3://bucket/clicks), or open-bandit:CAMPAIGN for the sample of the Open Bandit Dataset in the
package obp (extra 'obp'; campaigns men, women, all). The schema file names the columns and how
text files write their values; see docs/how-to/prepare-a-log.md.

\b
Example:
  offtower ingest clicks.csv --schema schema.yaml --catalogue items.csv --out logs/mine --split time
  offtower ingest open-bandit:men --out logs/men --split time
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from offtower.cli.cluster import IN_PROCESS, RayOptions
from offtower.cli.common import AsJson, DrawnProgress, escape, messages, print_json, verb
from offtower.cli.findings import print_findings
from offtower.errors import ConfigError, DataError
from offtower.jsonable import finite

if TYPE_CHECKING:
    from offtower.data.ingest.plan import IngestSummary


@verb
def ingest(
    source: Annotated[str, typer.Argument(help="File, folder, or open-bandit:CAMPAIGN.")],
    out: Annotated[str, typer.Option(help="New folder or address of log/ and catalogue/.")],
    schema: Annotated[
        Path | None, typer.Option(help="YAML with the sections log and catalogue.")
    ] = None,
    catalogue: Annotated[
        str | None, typer.Option(help="File or folder of items; by default those in the log.")
    ] = None,
    split: Annotated[
        Literal["time", "user", "row"] | None,
        typer.Option(help="Also split the log into train, validation, test."),
    ] = None,
    fractions: Annotated[str, typer.Option(help="Shares of the split.")] = "0.6,0.2,0.2",
    history: Annotated[
        str | None,
        typer.Option(
            help="Give each row the earlier events of its user as a feature: KEY,LENGTH, as in "
            "user,50; user,50,rewarded takes events with a positive reward."
        ),
    ] = None,
    on_bad_rows: Annotated[
        Literal["error", "quarantine"], typer.Option(help="Fail, or move bad rows aside.")
    ] = "error",
    accept_moved_mean: Annotated[
        bool,
        typer.Option(
            "--accept-moved-mean",
            help="Confirm a quarantine that moves the mean reward by more than chance.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of a split by user or row.")] = 0,
    ray: RayOptions = IN_PROCESS,
    as_json: AsJson = False,
) -> None:
    from offtower.data.ingest import (
        HistoryOptions,
        IngestSource,
        Split,
        ingest_files,
        ingest_open_bandit,
    )

    shares = _fractions(fractions)
    parts = None if split is None else Split(split, shares, seed)
    open_bandit = source.startswith("open-bandit:")
    events = None if history is None else HistoryOptions.parse(history)
    if open_bandit and events is not None:
        raise ConfigError("--history needs users, which the Open Bandit Dataset does not have")
    schemas = None if open_bandit else read_schemas(schema)
    with ray.execution(DrawnProgress()) as execution:
        if schemas is None:
            campaign = source.partition(":")[2]
            summary = ingest_open_bandit(campaign, out, split=parts, execution=execution)
        else:
            summary = ingest_files(
                IngestSource(source, schemas[0], catalogue, schemas[1], schemas[2], events),
                out,
                on_bad_rows=on_bad_rows,
                moved_mean="accept" if accept_moved_mean else "error",
                split=parts,
                execution=execution,
            )
    if as_json:
        print_json(finite(summary.to_dict()))
        return
    console = messages()
    console.print(f"{summary.rows:,} rows in {summary.log}")
    console.print(f"{summary.items:,} items in {summary.catalogue}")
    if summary.quarantined:
        console.print(
            f"[yellow]{summary.quarantined:,} bad rows in {summary.log.parent / 'quarantine'}[/]"
        )
    if summary.outcomes is not None:
        counts = summary.outcomes
        console.print(
            f"{counts.young:,} rows left out as younger than the maturity "
            f"({counts.young_rewarded:,} of them rewarded); {counts.late:,} late outcomes ignored; "
            f"{counts.missing:,} rows without an outcome took outcomes.missing"
        )
    for note in summary.notes:
        console.print(f"[yellow]note[/]  {escape(note)}", soft_wrap=True)
    for name, rows in summary.splits.items():
        console.print(f"{rows:,} rows in {summary.log.parent / name}")
    if summary.report is not None:
        remarks = summary.report.remarks
        console.print("nothing looks wrong" if not remarks else "what looks wrong:")
        print_findings(remarks)
    console.print(escape(_next_step(summary)), soft_wrap=True)


def _next_step(summary: IngestSummary) -> str:
    """The next command, with the written folders as a configuration names them."""
    folders = {"catalogue": summary.catalogue}
    for part in ("train", "validation", "test"):
        if part in summary.splits:
            folders[part] = summary.log.parent / part
    if "train" not in folders:
        return f"next: offtower validate {summary.log}, or ingest with --split to train on a part"
    named = ", ".join(f"{key}: {folder}" for key, folder in folders.items())
    return f"next: offtower train CONFIG, with data: {{{named}}}"


def read_schemas(path: Path | None) -> tuple[Any, Any, Any]:
    """Parse the sections `log`, `catalogue` and `format` of a schema file."""
    if path is None:
        raise ConfigError(
            "--schema is needed: a YAML file that names the log's columns (README, 'Your own log')"
        )
    from offtower.config import read_yaml
    from offtower.data import CatalogueSchema, LogSchema
    from offtower.data.formats.options import SourceFormats

    content = read_yaml(path, "schema")
    if not isinstance(content, dict) or "log" not in content:
        raise ConfigError(f"'{path}' must have a section 'log' (and may have 'catalogue')")
    unknown = sorted(set(content) - {"log", "catalogue", "format"})
    if unknown:
        raise ConfigError(
            f"'{path}': unknown section '{unknown[0]}'; known: log, catalogue, format"
        )
    catalogue = content.get("catalogue")
    return (
        LogSchema.from_dict(content["log"]),
        None if catalogue is None else CatalogueSchema.from_dict(catalogue),
        SourceFormats.from_dict(content.get("format")),
    )


def read_formats(path: Path) -> Any:
    """Parse the section `format` of a schema file, whose other sections may be missing."""
    from offtower.config import read_yaml
    from offtower.data.formats.options import SourceFormats

    content = read_yaml(path, "schema")
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' must hold keys and values")
    return SourceFormats.from_dict(content.get("format"))


def _fractions(text: str) -> tuple[float, ...]:
    try:
        parts = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--fractions '{text}' must be numbers with commas") from None
    if not 2 <= len(parts) <= 3 or min(parts) <= 0 or abs(sum(parts) - 1) > 1e-9:
        raise DataError(f"--fractions '{text}' must be two or three positive shares with sum 1")
    return parts
