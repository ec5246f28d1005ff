"""Join decisions and outcomes in files, and write the log that `offtower ingest` takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from offtower.data.columns import is_text
from offtower.data.formats.kinds import ColumnKind, joined_kinds
from offtower.data.formats.options import SourceFormats
from offtower.data.join import JoinCounts, JoinPlan, join_outcomes
from offtower.data.location import AnyPath, Location
from offtower.data.output import new_file
from offtower.data.schema import CatalogueSchema, LogSchema, Outcomes
from offtower.data.source import Source, column_names, open_source
from offtower.errors import DataError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def join_files(
    decisions: AnyPath,
    outcomes: AnyPath,
    out: AnyPath,
    plan: JoinPlan,
    formats: SourceFormats | None = None,
) -> JoinCounts:
    """Join two files or folders into one Parquet file, in the order of the decisions.

    Memory is bounded: temporary files take about 32 bytes a decision and 56 an outcome.

    Args:
        formats: how both sides write their values, as `log` and `outcomes`.

    Raises:
        DataError: `out` exists, a file cannot be read, or as `join_outcomes`.
    """
    out = Location.of(out)
    if out.exists():
        raise DataError(f"'{out}' exists already; choose another file")

    shown, came = _open_sides(decisions, outcomes, plan, formats or SourceFormats())

    def read(source: Source) -> Iterator[pa.Table]:
        for unit in range(len(source)):
            for batch in source.batches(unit):
                yield pa.Table.from_batches([batch])

    with tempfile.TemporaryDirectory(prefix="offtower-join-") as folder, new_file(out) as file:
        joined = join_outcomes(lambda: read(shown), lambda: read(came), plan, Path(folder))
        writer: pq.ParquetWriter | None = None
        try:
            for table in joined.tables:
                if writer is None:
                    writer = pq.ParquetWriter(
                        file, table.schema, compression="zstd", write_page_checksum=True
                    )
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
    return joined.counts


def _open_sides(
    decisions: AnyPath, outcomes: AnyPath, plan: JoinPlan, formats: SourceFormats
) -> tuple[Source, Source]:
    """Open both sides; keys are text or integers in both, as the decisions have them."""
    mine: list[tuple[str, ColumnKind]] = [(name, "text") for name, _ in plan.keys]
    theirs: list[tuple[str, ColumnKind]] = [(name, "text") for _, name in plan.keys]
    mine += [] if plan.decided is None else [(plan.decided, "time")]
    theirs += [] if plan.came is None else [(plan.came, "time")]
    there = set(column_names(outcomes, formats.outcomes))
    theirs += [(one.source, "number") for one in plan.rewards if one.source in there]
    shown = open_source(decisions, joined_kinds(mine), formats.log, further=True)
    came = open_source(outcomes, joined_kinds(theirs), formats.outcomes, further=True)
    for one, other in plan.keys:
        came = came.with_ids(other, is_text(shown.schema.field(one).type))
    return shown, came


def schema_beside(file: AnyPath) -> Location:
    """Return where the schema of a file stands: day.schema.yaml beside day.parquet."""
    place = Location.of(file)
    return place.parent / f"{PurePosixPath(place.name).stem}.schema.yaml"


def outcomes_section(
    plan: JoinPlan, missing: str | float, counts: JoinCounts, is_number: bool
) -> Outcomes | None:
    """Return the section `outcomes` of the joined log's schema; None without a window.

    Outcomes were collected at least until the newest of them.
    """
    if plan.window is None:
        return None
    at: datetime | float | None = None
    if counts.newest is not None:
        newest = counts.newest
        at = float(newest) if is_number else _EPOCH + timedelta(microseconds=newest)
    wanted: float | None = None if isinstance(missing, str) else missing
    return Outcomes(plan.window, "error" if wanted is None else wanted, None, at)


def write_schema(
    file: AnyPath, log: LogSchema, catalogue: CatalogueSchema | None, outcomes: Outcomes | None
) -> Location:
    """Write the schema of a joined log beside it."""
    content = {"log": replace(log, outcomes=outcomes or log.outcomes).to_dict()}
    if catalogue is not None:
        content["catalogue"] = catalogue.to_dict()
    place = schema_beside(file)
    place.write_bytes(yaml.safe_dump(content, sort_keys=False).encode())
    return place
