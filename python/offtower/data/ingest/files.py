"""Ingest of files, and of the Open Bandit Dataset."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from offtower.data.catalogue import Catalogue, write_catalogue
from offtower.data.eligible import reading_index
from offtower.data.findings.users import users_in_both
from offtower.data.formats.kinds import catalogue_kinds, log_kinds
from offtower.data.ingest.claim import claimed
from offtower.data.ingest.histories import write_with_histories
from offtower.data.ingest.notes import NO_PROPENSITIES, catalogue_notes, quarantine_notes
from offtower.data.ingest.plan import IngestSource, IngestSummary, Split
from offtower.data.ingest.writing import mark_single_draws, write_rows
from offtower.data.location import AnyPath, Location
from offtower.data.log import ParquetLog, write_log
from offtower.data.obd import import_open_bandit
from offtower.data.outcomes import check_outcome_columns, collected_at, newest_time
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.source import (
    CheckedUnits,
    Source,
    column_names,
    joined_values,
    open_source,
    read_source,
)
from offtower.data.split import split_log
from offtower.data.validate import ValidationReport, validate_log
from offtower.errors import DataError
from offtower.execution import LOCAL, Execution
from offtower.mapping import Mapper


def ingest_files(
    source: IngestSource,
    out: AnyPath,
    *,
    on_bad_rows: str = "error",
    moved_mean: Literal["error", "accept"] = "error",
    split: Split | None = None,
    execution: Execution = LOCAL,
) -> IngestSummary:
    """Check every row of the source; write `out`/log, `out`/catalogue and the parts of the split.

    What a killed ingest left in `out` is removed first, with a warning.

    Args:
        on_bad_rows: "error", or "quarantine" to set them aside in `out`/quarantine.
        moved_mean: whether to refuse a quarantine that moves the mean reward by more than chance.
        execution: where the source is read and files are written; the files are the same with any
            mapper. A distributed one reads the source once more, to count its rows, and needs a
            path that every worker sees.

    Raises:
        ConfigError: the schema has no columns to build histories from.
        DataError: no such source, an unknown format, a bad row (unless quarantined), a source
            without rewards, a log of which no row is mature, a quarantine that moves the mean
            reward, or `out` holds a log already.
        LeaseError: another process writes to `out`.
    """
    log = Location.of(source.log)
    schema = source.schema
    written = source.formats.log
    names = column_names(log, written)
    blind = schema.pscore == LogSchema().pscore and schema.pscore not in names
    if blind:
        # The key was not set, and the file has no such column: a log without propensities.
        schema = replace(schema, pscore=None)
        source = replace(source, schema=schema)
    if source.history is not None:
        source.history.column(schema)
    if schema.action in names:
        check_outcome_columns(names, schema, str(log))
    units = open_source(log, log_kinds(schema), written, whole_files=schema.slates)
    with claimed(out, split) as out:
        if source.catalogue is None:
            _check_item_columns(source.schema)
            table, catalogue_schema = _shown_items(units, source.schema, execution.mapper)
        else:
            catalogue_schema = source.catalogue_schema or CatalogueSchema()
            kinds = catalogue_kinds(catalogue_schema, schema.eligible)
            table = read_source(source.catalogue, kinds, source.formats.catalogue)
            catalogue_schema = catalogue_schema.keeping(source.schema.eligible)
        catalogue = Catalogue.from_table(table, catalogue_schema)
        units = units.like_catalogue(schema, table, catalogue_schema)
        quarantine = (out / "quarantine").absolute() if on_bad_rows == "quarantine" else None
        schema = _dated(source.schema, units, execution.mapper)
        rows = CheckedUnits.uncounted(units, schema, reading_index(catalogue, schema), quarantine)
        if source.history is None:
            found = write_rows(out / "log", rows, execution)
        else:
            found = write_with_histories(out / "log", rows, catalogue, source.history, execution)
        mark_single_draws(out / "log")
        notes = [NO_PROPENSITIES] if schema.pscore is None else []
        notes += [*catalogue_notes(catalogue_schema), *quarantine_notes(found, moved_mean)]
        write_catalogue(out / "catalogue", table, catalogue_schema)
        splits = _split(out, split, execution)
    report = _report(out, catalogue, split, execution)
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
    execution: Execution = LOCAL,
) -> IngestSummary:
    """Write the Open Bandit Dataset sample inside the obp package, both logging policies.

    Raises:
        MissingExtraError: obp is not installed.
        DataError: an unknown campaign, or `out` holds a log already.
        LeaseError: another process writes to `out`.
    """
    tables, schema, catalogue = import_open_bandit(campaign)
    items = catalogue.num_items
    with claimed(out, split) as out:
        manifest = write_log(out / "log", tables, schema, rows_per_group=4096)
        write_catalogue(out / "catalogue", catalogue.table(0, items), catalogue.schema)
        splits = _split(out, split, execution)
    rows = int(manifest["num_rows"])
    report = _report(out, catalogue, split, execution)
    return IngestSummary(out / "log", out / "catalogue", rows, items, 0, splits, report=report)


def _report(
    out: Location, catalogue: Catalogue, split: Split | None, execution: Execution
) -> ValidationReport:
    """Validate the written log, and look for users in both parts of the split."""
    log = ParquetLog.open(out / "log")
    report = validate_log(log, catalogue, execution=execution)
    if split is None or log.schema.user_id is None:
        return report
    parts = {name: ParquetLog.open(out / name) for name in split.names}
    return replace(report, findings=(*report.findings, *users_in_both(parts, split.by)))


def _split(out: Location, split: Split | None, execution: Execution) -> dict[str, int]:
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
        execution=execution,
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
