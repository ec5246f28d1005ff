"""From files as they come (CSV, Parquet, Arrow) to a checked log and catalogue directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from offtower.data.catalogue import Catalogue, write_catalogue
from offtower.data.check import RowChecker
from offtower.data.location import Location, Place
from offtower.data.log import write_log
from offtower.data.obd import import_open_bandit
from offtower.data.output import check_new
from offtower.data.parts import write_log_parts
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.source import CheckedUnits, Units, joined_values, open_source, read_source
from offtower.data.split import SplitBy, split_log
from offtower.errors import DataError
from offtower.mapping import Mapper
from offtower.progress import Progress, watched


@dataclass
class IngestSummary:
    """What an ingestion wrote."""

    log: Location
    catalogue: Location
    rows: int
    items: int
    quarantined: int
    splits: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "log": str(self.log),
            "catalogue": str(self.catalogue),
            "rows": self.rows,
            "items": self.items,
            "quarantined": self.quarantined,
            "splits": self.splits,
        }


def ingest_files(
    log_source: Place,
    out: Place,
    schema: LogSchema,
    *,
    catalogue_source: Place | None = None,
    catalogue_schema: CatalogueSchema | None = None,
    on_bad_rows: str = "error",
    mapper: Mapper | None = None,
    progress: Progress | None = None,
) -> IngestSummary:
    """Read a file or a folder of files, check every row, write `out`/log and `out`/catalogue.

    Without a catalogue source the catalogue is the set of items that the log shows, and the item
    id is its only feature.

    mapper: where the source is read and files are written; the files are the same with any. One
        that is distributed reads the source once more, to count its rows, and needs a path that
        every worker sees.

    Raises:
        DataError: no such source, an unknown format, or a bad row (unless quarantined).
    """
    mapper, progress = mapper or Mapper(), progress or Progress()
    out = _new(out)
    log_source = Location.of(log_source)
    source = open_source(log_source)
    units = Units(source, log_source, schema.columns)
    if catalogue_source is None:
        catalogue_table, catalogue_schema = _shown_items(source, log_source, schema, mapper)
    else:
        catalogue_table = read_source(catalogue_source)
        catalogue_schema = catalogue_schema or CatalogueSchema()
    catalogue = Catalogue.from_table(catalogue_table, catalogue_schema)
    quarantine = (out / "quarantine").absolute() if on_bad_rows == "quarantine" else None
    rows, bad = _write(out / "log", units, schema, catalogue, quarantine, mapper, progress)
    write_catalogue(out / "catalogue", catalogue_table, catalogue_schema)
    return IngestSummary(
        log=out / "log",
        catalogue=out / "catalogue",
        rows=rows,
        items=catalogue.num_items,
        quarantined=bad,
    )


def _new(out: Place) -> Location:
    """The folder for a log and a catalogue, which it must not have yet."""
    out = Location.of(out)
    for name in ("log", "catalogue"):
        if out.local is None:
            check_new(out / name)
        elif (out / name).exists():
            raise DataError(f"'{out}' already holds a log or a catalogue; choose another --out")
    return out


def ingest_open_bandit(campaign: str, out: Place) -> IngestSummary:
    """The Open Bandit Dataset sample inside the obp package, both logging policies.

    Raises:
        MissingExtraError: obp is not installed.
        DataError: an unknown campaign, or `out` already holds a log.
    """
    tables, schema, catalogue = import_open_bandit(campaign)
    out = _new(out)
    manifest = write_log(out / "log", tables, schema, rows_per_group=4096)
    write_catalogue(out / "catalogue", catalogue.table(0, catalogue.num_items), catalogue.schema)
    return IngestSummary(
        log=out / "log",
        catalogue=out / "catalogue",
        rows=int(manifest["num_rows"]),
        items=catalogue.num_items,
        quarantined=0,
    )


def split_ingested(
    summary: IngestSummary,
    by: SplitBy,
    fractions: tuple[float, ...],
    seed: int,
    *,
    mapper: Mapper | None = None,
    progress: Progress | None = None,
) -> IngestSummary:
    """Cut `log` into train, validation and test beside it."""
    out = summary.log.parent
    names = ("train", "validation", "test")[: len(fractions)]
    counts = split_log(
        summary.log,
        out,
        by=by,
        fractions=fractions,
        names=names,
        seed=seed,
        mapper=mapper,
        progress=progress,
    )
    return replace(summary, splits=counts)


def _shown_items(
    source: ds.Dataset, place: Location, schema: LogSchema, mapper: Mapper
) -> tuple[pa.Table, CatalogueSchema]:
    units = Units(source, place, [schema.action])
    seen: pa.Array | None = None
    for _, values in mapper.map(units.distinct, range(len(units)), "finding items"):
        seen = joined_values(seen, values)
    if seen is None or len(seen) == 0:
        raise DataError("the log shows no item, so no catalogue can be made from it")
    order = pc.sort_indices(seen)
    return (
        pa.table({"item_id": seen.take(order)}),
        CatalogueSchema(features=(FeatureSpec(name="item_id", kind="category"),)),
    )


def _write(
    out: Location,
    units: Units,
    schema: LogSchema,
    catalogue: Catalogue,
    quarantine: Location | None,
    mapper: Mapper,
    progress: Progress,
) -> tuple[int, int]:
    """Write `out`; rows written, and rows set aside."""
    none = np.zeros(len(units), dtype=np.int64)
    rows = CheckedUnits(units, schema, schema, len(units), catalogue.bare(), none, quarantine, none)
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
    rows.first_rows, rows.counts = np.cumsum(counted) - counted, counted
    rows.learned_in, rows.learned = _learned(rows)
    bad = 0
    if quarantine is not None:
        progress.start("checking rows", int(counted.sum()))
        tallies = list(
            watched(mapper.map(rows.tally, range(len(units)), "checking rows"), progress)
        )
        progress.finish()
        bad = sum(one.bad for one in tallies)
        rows.counts = np.asarray([one.good for one in tallies], dtype=np.int64)
    manifest = write_log_parts(out, rows, schema, mapper, progress=progress, task="writing rows")
    return int(manifest["num_rows"]), bad


def _stream(out: Location, rows: CheckedUnits, progress: Progress) -> tuple[int, int]:
    """The same in one pass."""
    progress.start("reading the log", None)
    checker = RowChecker(rows.schema, rows.catalogue, quarantine=rows.quarantine)

    def tables() -> Iterator[pa.Table]:
        first_row = 0
        for unit in range(len(rows.units)):
            for batch in rows.units.batches(unit):
                table = pa.Table.from_batches([batch])
                yield checker.check(table, (str(rows.units.place), 0), first_row)
                first_row += batch.num_rows
                progress.advance(batch.num_rows)

    manifest = write_log(out, tables(), rows.schema)
    progress.finish()
    return int(manifest["num_rows"]), checker.bad_rows


def _learned(rows: CheckedUnits) -> tuple[int, LogSchema]:
    """The unit with the first good row, and the schema with the lengths of that row's vectors."""
    for unit in range(len(rows.units)):
        checker = RowChecker(rows.schema, rows.catalogue, quarantine=rows.quarantine)
        for table, checker in rows.checked(unit):
            if table.num_rows:
                return unit, checker.schema
    return len(rows.units), rows.schema
