"""Ingest CSV, Parquet and Arrow files as a checked log and catalogue."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offtower.atomic import remove_leftovers
from offtower.data.catalogue import Catalogue, write_catalogue
from offtower.data.check import RowChecker
from offtower.data.eligible import reading_index
from offtower.data.findings.users import users_in_both
from offtower.data.formats.kinds import catalogue_kinds, log_kinds
from offtower.data.formats.options import SourceFormats
from offtower.data.lease import Lease
from offtower.data.location import AnyPath, Location
from offtower.data.log import ParquetLog, write_log
from offtower.data.obd import import_open_bandit
from offtower.data.outcomes import (
    OutcomeCounts,
    check_outcome_columns,
    collected_at,
    newest_time,
    stored_schema,
)
from offtower.data.output import check_new
from offtower.data.parts import write_log_parts
from offtower.data.round_tables import whole_round_tables
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.source import (
    CheckedUnits,
    Source,
    UnitTally,
    column_names,
    joined_values,
    open_source,
    read_source,
)
from offtower.data.split import SplitBy, split_log
from offtower.data.validate import ValidationReport, validate_log
from offtower.errors import DataError
from offtower.mapping import Mapper
from offtower.progress import Progress, report_rows

logger = logging.getLogger("offtower.data")

_MARKER = ".ingest.json"
_FOLDERS = ("log", "catalogue", "train", "validation", "test", "quarantine")


@dataclass
class IngestSummary:
    """What an ingest wrote."""

    log: Location
    catalogue: Location
    rows: int
    items: int
    quarantined: int
    splits: dict[str, int] = field(default_factory=dict)
    outcomes: OutcomeCounts | None = None
    """Rows left out or filled by the schema's section `outcomes`; None without one."""
    notes: tuple[str, ...] = ()
    """What the user should know about the result."""
    report: ValidationReport | None = None
    """What looks wrong in the log, and in its split."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "log": str(self.log),
            "catalogue": str(self.catalogue),
            "rows": self.rows,
            "items": self.items,
            "quarantined": self.quarantined,
            "splits": self.splits,
            "outcomes": None if self.outcomes is None else self.outcomes.to_dict(),
            "notes": list(self.notes),
            "report": None if self.report is None else self.report.to_dict(),
        }


@dataclass(frozen=True)
class IngestSource:
    """Where rows and items come from: files, or folders of files.

    Attributes:
        catalogue: the items; without it those that the log shows, known by their ids alone.
        formats: how the files write their values.
    """

    log: AnyPath
    schema: LogSchema
    catalogue: AnyPath | None = None
    catalogue_schema: CatalogueSchema | None = None
    formats: SourceFormats = field(default_factory=SourceFormats)


_NO_PROPENSITIES = (
    "the log has no propensities (no column pscore): policies can be learned from it by regression "
    "and likelihood, but whether one is better than today's rests on estimates; "
    "docs/how-to/without-propensities.md says what can be done"
)


@dataclass(frozen=True)
class Split:
    """How to split the ingested log into train, validation and, given three fractions, test."""

    by: SplitBy
    fractions: tuple[float, ...] = (0.6, 0.2, 0.2)
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return ("train", "validation", "test")[: len(self.fractions)]


def ingest_files(
    source: IngestSource,
    out: AnyPath,
    *,
    on_bad_rows: str = "error",
    moved_mean: Literal["error", "accept"] = "error",
    split: Split | None = None,
    mapper: Mapper | None = None,
    progress: Progress | None = None,
) -> IngestSummary:
    """Check every row of the source; write `out`/log, `out`/catalogue and the parts of the split.

    What a killed ingest left in `out` is removed first, with a warning.

    Args:
        on_bad_rows: "error", or "quarantine" to set them aside in `out`/quarantine.
        moved_mean: whether to refuse a quarantine that moves the mean reward by more than chance.
        mapper: where the source is read and files are written; the files are the same with any. One
            that is distributed reads the source once more, to count its rows, and needs a path that
            every worker sees.

    Raises:
        DataError: no such source, an unknown format, a bad row (unless quarantined), a source
            without rewards, a log of which no row is mature, a quarantine that moves the mean
            reward, or `out` holds a log already.
        LeaseError: another process writes to `out`.
    """
    mapper, progress = mapper or Mapper(), progress or Progress()
    log = Location.of(source.log)
    schema = source.schema
    written = source.formats.log
    names = column_names(log, written)
    blind = schema.pscore == LogSchema().pscore and schema.pscore not in names
    if blind:
        # The key was not set, and the file has no such column: a log without propensities.
        schema = replace(schema, pscore=None)
        source = replace(source, schema=schema)
    if schema.action in names:
        check_outcome_columns(names, schema, str(log))
    units = open_source(log, log_kinds(schema), written, whole_files=schema.slates)
    with _claimed(out, split) as out:
        if source.catalogue is None:
            _check_item_columns(source.schema)
            table, catalogue_schema = _shown_items(units, source.schema, mapper)
        else:
            catalogue_schema = source.catalogue_schema or CatalogueSchema()
            kinds = catalogue_kinds(catalogue_schema, schema.eligible)
            table = read_source(source.catalogue, kinds, source.formats.catalogue)
            catalogue_schema = catalogue_schema.keeping(source.schema.eligible)
        catalogue = Catalogue.from_table(table, catalogue_schema)
        units = units.like_catalogue(schema, table, catalogue_schema)
        quarantine = (out / "quarantine").absolute() if on_bad_rows == "quarantine" else None
        schema = _dated(source.schema, units, mapper)
        found = _write(out / "log", units, schema, catalogue, quarantine, mapper, progress)
        notes = [_NO_PROPENSITIES] if schema.pscore is None else []
        notes += [*_catalogue_notes(catalogue_schema), *_quarantine_notes(found, moved_mean)]
        write_catalogue(out / "catalogue", table, catalogue_schema)
        splits = _split(out, split, mapper, progress)
    report = _report(out, catalogue, split, mapper, progress)
    return IngestSummary(
        out / "log",
        out / "catalogue",
        found.good,
        catalogue.num_items,
        found.bad,
        splits,
        None if schema.outcomes is None else found.outcomes,
        tuple(notes),
        report,
    )


def ingest_open_bandit(
    campaign: str,
    out: AnyPath,
    *,
    split: Split | None = None,
    mapper: Mapper | None = None,
    progress: Progress | None = None,
) -> IngestSummary:
    """Write the Open Bandit Dataset sample inside the obp package, both logging policies.

    Raises:
        MissingExtraError: obp is not installed.
        DataError: an unknown campaign, or `out` holds a log already.
        LeaseError: another process writes to `out`.
    """
    tables, schema, catalogue = import_open_bandit(campaign)
    items = catalogue.num_items
    with _claimed(out, split) as out:
        manifest = write_log(out / "log", tables, schema, rows_per_group=4096)
        write_catalogue(out / "catalogue", catalogue.table(0, items), catalogue.schema)
        splits = _split(out, split, mapper, progress)
    rows = int(manifest["num_rows"])
    report = _report(out, catalogue, split, mapper or Mapper(), progress or Progress())
    return IngestSummary(out / "log", out / "catalogue", rows, items, 0, splits, report=report)


def _report(
    out: Location, catalogue: Catalogue, split: Split | None, mapper: Mapper, progress: Progress
) -> ValidationReport:
    """Validate the written log, and look for users in both parts of the split."""
    log = ParquetLog.open(out / "log")
    report = validate_log(log, catalogue, mapper=mapper, progress=progress)
    if split is None or log.schema.user_id is None:
        return report
    parts = {name: ParquetLog.open(out / name) for name in split.names}
    return replace(report, findings=(*report.findings, *users_in_both(parts, split.by)))


def _split(
    out: Location, split: Split | None, mapper: Mapper | None, progress: Progress | None
) -> dict[str, int]:
    """Write the parts beside the log; rows of each."""
    if split is None:
        return {}
    return split_log(
        out / "log",
        out,
        by=split.by,
        fractions=split.fractions,
        names=split.names,
        seed=split.seed,
        mapper=mapper,
        progress=progress,
    )


@contextmanager
def _claimed(out: AnyPath, split: Split | None) -> Iterator[Location]:
    """Hold `out` for one ingest, without what a killed one left there.

    A marker names the folders that this ingest will write and that did not exist before. It is
    removed at the end, so that a marker without a living owner means that they are incomplete.
    """
    out = Location.of(out)
    names = ["log", "catalogue", *(() if split is None else split.names)]
    lease = Lease.acquire(out, remedy=", or choose another --out")
    try:
        marker = out / _MARKER
        _remove_interrupted(out, marker)
        for name in names:
            check_new(out / name)
        if not (out / "quarantine").exists():
            names.append("quarantine")
        marker.write_bytes(json.dumps({"folders": names}).encode())
        try:
            yield out
        except BaseException:
            if not (out / "catalogue").exists():
                (out / "log").remove()
            raise
        finally:
            marker.remove()
    finally:
        lease.release(remove=True)


def _remove_interrupted(out: Location, marker: Location) -> None:
    try:
        names = json.loads(marker.read_bytes())["folders"]
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"'{marker}' of an interrupted ingest is damaged ({error}); remove '{out}', or choose "
            "another --out"
        ) from error
    found = [name for name in _FOLDERS if name in names and (out / name).exists()]
    for name in found:
        (out / name).remove()
    if out.local is not None:
        remove_leftovers(out.local)
        for path in out.local.glob(".split-*"):
            shutil.rmtree(path, ignore_errors=True)
    logger.warning(
        "an earlier ingest into '%s' was interrupted; removed what it had written (%s) to start "
        "again",
        out,
        ", ".join(found) or "no whole folder",
    )


def _check_item_columns(schema: LogSchema) -> None:
    """Check that the section `eligible` needs no columns of a catalogue that is not given.

    Raises:
        DataError: it does.
    """
    names = () if schema.eligible is None else schema.eligible.item_columns
    if names:
        raise DataError(
            f"the section 'eligible' of the log schema reads the catalogue's column '{names[0]}': "
            "give the items' file with --catalogue"
        )


def _shown_items(
    units: Source, schema: LogSchema, mapper: Mapper
) -> tuple[pa.Table, CatalogueSchema]:
    seen: pa.Array | None = None
    distinct = partial(units.distinct, column=schema.action)
    for _, values in mapper.map(distinct, range(len(units)), "finding items"):
        seen = joined_values(seen, values)
    if seen is None or len(seen) == 0:
        raise DataError("the log shows no item, so no catalogue can be made from it")
    order = pc.sort_indices(seen)
    return (
        pa.table({"item_id": seen.take(order)}),
        CatalogueSchema(features=(FeatureSpec(name="item_id", kind="category"),)),
    )


def _dated(schema: LogSchema, units: Source, mapper: Mapper) -> LogSchema:
    """Return the schema with the time at which outcomes were collected."""
    outcomes = schema.outcomes
    if outcomes is None or outcomes.as_of is not None:
        return schema
    assert schema.timestamp is not None
    columns = [name for name in (schema.timestamp, outcomes.time) if name is not None]
    found = mapper.map(
        partial(_newest, units, columns), range(len(units)), "finding the newest row"
    )
    newest = [one for one in found if one is not None]
    kind = units.schema.field(schema.timestamp).type
    dated = collected_at(outcomes, max(newest) if newest else None, not pa.types.is_timestamp(kind))
    return replace(schema, outcomes=dated)


def _newest(units: Source, columns: list[str], unit: int) -> int | None:
    return newest_time(
        pa.chunked_array([batch.column(name)])
        for batch in units.batches(unit, columns)
        for name in columns
    )


def _catalogue_notes(schema: CatalogueSchema) -> list[str]:
    if schema.features and schema.features != (FeatureSpec(name="item_id", kind="category"),):
        return []
    return [
        "the catalogue has no features besides the ids: the item tower learns each item alone, and "
        "nothing about items that the log does not show. If the items have features, name them in "
        "the schema's section catalogue and pass --catalogue"
    ]


def _quarantine_notes(found: UnitTally, moved_mean: str) -> list[str]:
    effect = found.effect
    if not effect.moves_mean:
        return []
    text = (
        f"the quarantine moves the mean reward from {effect.every.mean:.5g} (all "
        f"{effect.every.count:,} rows with a reward) to {effect.good.mean:.5g} "
        f"({effect.good.count:,} good rows)"
    )
    if moved_mean == "accept":
        return [text]
    raise DataError(
        f"{text}. Rewards from {effect.every.smallest:g} to {effect.every.largest:g} were read: if "
        "they are right, state reward_range in the schema; if the bad rows are to be left out all "
        "the same, confirm it with --accept-moved-mean"
    )


def _write(
    out: Location,
    units: Source,
    schema: LogSchema,
    catalogue: Catalogue,
    quarantine: Location | None,
    mapper: Mapper,
    progress: Progress,
) -> UnitTally:
    """Write `out`; what was written, and what was set aside or left out."""
    none = np.zeros(len(units), dtype=np.int64)
    rows = CheckedUnits(
        units, schema, schema, len(units), reading_index(catalogue, schema), none, quarantine, none
    )
    if not mapper.distributed:
        return _stream(out, rows, progress)
    # Numbers of rows, then of good rows, then the files, each of which is known by its numbers.
    progress.start("counting rows", len(units))
    counts = []
    for count in mapper.map(units.count, range(len(units)), "counting rows"):
        counts.append(count)
        progress.advance(1)
    progress.finish()
    counted = np.asarray(counts, dtype=np.int64)
    _check_some_rows(int(counted.sum()), units)
    rows.first_rows, rows.counts = np.cumsum(counted) - counted, counted
    rows.learned_in, rows.learned = _learned(rows)
    found = UnitTally(int(counted.sum()), 0)
    if quarantine is not None or schema.outcomes is not None:
        progress.start("checking rows", int(counted.sum()))
        tallies = list(
            report_rows(mapper.map(rows.tally, range(len(units)), "checking rows"), progress)
        )
        progress.finish()
        found = sum(tallies, UnitTally(0, 0))
        rows.counts = np.asarray([one.good for one in tallies], dtype=np.int64)
    _check_some_mature(found, schema)
    write_log_parts(
        out, rows, stored_schema(schema), mapper, progress=progress, task="writing rows"
    )
    return found


def _stream(out: Location, rows: CheckedUnits, progress: Progress) -> UnitTally:
    """The same in one pass."""
    progress.start("reading the log", None)
    checker = RowChecker(rows.schema, rows.catalogue, quarantine=rows.quarantine)

    def tables() -> Iterator[pa.Table]:
        first_row = 0
        for unit in range(len(rows.units)):
            located = rows.units.located(unit)
            for table, origin in whole_round_tables(located, rows.schema):
                yield checker.check(table, origin, first_row)
                first_row += table.num_rows
                progress.advance(table.num_rows)
        _check_some_rows(first_row, rows.units)
        good = first_row - checker.bad_rows - checker.outcomes.young
        _check_some_mature(UnitTally.of(good, checker), rows.schema)

    manifest = write_log(out, tables(), stored_schema(rows.schema))
    progress.finish()
    return UnitTally.of(int(manifest["num_rows"]), checker)


def _check_some_rows(rows: int, source: Source) -> None:
    if rows == 0:
        raise DataError(f"'{source.place}' has no rows, only names of columns")


def _check_some_mature(found: UnitTally, schema: LogSchema) -> None:
    young = found.outcomes.young
    if found.good or not young or schema.outcomes is None:
        return
    raise DataError(
        f"all {young:,} rows are younger than outcomes.maturity ({schema.outcomes.maturity}) at "
        f"{schema.outcomes.as_of}, so no outcome is final. If the outcomes were collected later "
        "than the newest row, state when: outcomes.as_of"
    )


def _learned(rows: CheckedUnits) -> tuple[int, LogSchema]:
    """The unit with the first good row, and the schema with the lengths of that row's vectors."""
    for unit in range(len(rows.units)):
        checker = RowChecker(rows.schema, rows.catalogue, quarantine=rows.quarantine)
        for table, checker in rows.checked(unit):
            if table.num_rows:
                return unit, checker.schema
    return len(rows.units), rows.schema
