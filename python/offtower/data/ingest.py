"""From files as they come (CSV, Parquet, Arrow) to a checked log and catalogue directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from offtower.data.catalogue import Catalogue, write_catalogue
from offtower.data.check import RowChecker
from offtower.data.log import write_log
from offtower.data.obd import import_open_bandit
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.split import SplitBy, split_log
from offtower.errors import DataError
from offtower.progress import Progress

_FORMATS = {".csv": "csv", ".parquet": "parquet", ".arrow": "ipc", ".feather": "feather"}


@dataclass
class IngestSummary:
    """What an ingestion wrote."""

    log: Path
    catalogue: Path
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
    log_source: Path,
    out: Path,
    schema: LogSchema,
    *,
    catalogue_source: Path | None = None,
    catalogue_schema: CatalogueSchema | None = None,
    on_bad_rows: str = "error",
    progress: Progress | None = None,
) -> IngestSummary:
    """Read a file or a folder of files, check every row, write `out`/log and `out`/catalogue.

    Without a catalogue source the catalogue is the set of items that the log shows, and the item
    id is its only feature.

    Raises:
        DataError: no such source, an unknown format, or a bad row (unless quarantined).
    """
    progress = progress or Progress()
    if (out / "log").exists() or (out / "catalogue").exists():
        raise DataError(f"'{out}' already holds a log or a catalogue; choose another --out")
    source = open_source(log_source)
    if catalogue_source is None:
        catalogue_table, catalogue_schema = _shown_items(source, schema)
    else:
        catalogue_table = open_source(catalogue_source).to_table()
        catalogue_schema = catalogue_schema or CatalogueSchema()
    catalogue = Catalogue.from_table(catalogue_table, catalogue_schema)
    quarantine = out / "quarantine" if on_bad_rows == "quarantine" else None
    checker = RowChecker(schema, catalogue, quarantine=quarantine)
    progress.start("reading the log", None)
    manifest = write_log(
        out / "log", _checked(source, log_source, schema, checker, progress), schema
    )
    progress.finish()
    write_catalogue(out / "catalogue", catalogue_table, catalogue_schema)
    return IngestSummary(
        log=out / "log",
        catalogue=out / "catalogue",
        rows=int(manifest["num_rows"]),
        items=catalogue.num_items,
        quarantined=checker.bad_rows,
    )


def ingest_open_bandit(campaign: str, out: Path) -> IngestSummary:
    """The Open Bandit Dataset sample inside the obp package, both logging policies.

    Raises:
        MissingExtraError: obp is not installed.
        DataError: an unknown campaign, or `out` already holds a log.
    """
    tables, schema, catalogue = import_open_bandit(campaign)
    if (out / "log").exists() or (out / "catalogue").exists():
        raise DataError(f"'{out}' already holds a log or a catalogue; choose another --out")
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
    summary: IngestSummary, by: SplitBy, fractions: tuple[float, ...], seed: int
) -> IngestSummary:
    """Cut `log` into train, validation and test beside it."""
    out = summary.log.parent
    names = ("train", "validation", "test")[: len(fractions)]
    counts = split_log(summary.log, out, by=by, fractions=fractions, names=names, seed=seed)
    return replace(summary, splits=counts)


def open_source(path: Path) -> ds.Dataset:
    """A file, or a folder of files of one format."""
    if not path.exists():
        raise DataError(f"there is no file or folder at '{path}'")
    sample = path
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _FORMATS)
        if not files:
            raise DataError(f"'{path}' holds no {', '.join(_FORMATS)} file")
        sample = files[0]
    kind = _FORMATS.get(sample.suffix)
    if kind is None:
        raise DataError(
            f"'{sample}' has an unknown ending '{sample.suffix}'; known: {', '.join(_FORMATS)}"
        )
    try:
        return ds.dataset(path, format=kind)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"'{path}' cannot be read as {kind}: {error}") from error


def _checked(
    source: ds.Dataset, place: Path, schema: LogSchema, checker: RowChecker, progress: Progress
) -> Iterator[pa.Table]:
    first_row = 0
    wanted = [name for name in schema.columns if name in source.schema.names]
    missing = [name for name in schema.columns if name not in source.schema.names]
    if missing:
        raise DataError(
            f"'{place}' has no column {', '.join(repr(m) for m in missing)}; "
            f"it has {', '.join(source.schema.names)}"
        )
    try:
        for batch in source.to_batches(columns=wanted):
            if batch.num_rows == 0:
                continue
            table = checker.check(pa.Table.from_batches([batch]), (str(place), 0), first_row)
            first_row += batch.num_rows
            progress.advance(batch.num_rows)
            yield table
    except pa.ArrowInvalid as error:
        raise DataError(f"'{place}' cannot be read after row {first_row}: {error}") from error


def _shown_items(source: ds.Dataset, schema: LogSchema) -> tuple[pa.Table, CatalogueSchema]:
    seen: pa.Array | None = None
    for batch in source.to_batches(columns=[schema.action]):
        values = pc.drop_null(pc.unique(batch.column(0)))
        seen = values if seen is None else pc.unique(pa.concat_arrays([seen, values]))
    if seen is None or len(seen) == 0:
        raise DataError("the log shows no item, so no catalogue can be made from it")
    order = pc.sort_indices(seen)
    return (
        pa.table({"item_id": seen.take(order)}),
        CatalogueSchema(features=(FeatureSpec(name="item_id", kind="category"),)),
    )
