"""The checked rows of a source, written as a log in one pass or by several workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa

from offtower.data.check import RowChecker
from offtower.data.location import Location
from offtower.data.log import ParquetLog, one_item_a_round, write_log
from offtower.data.manifest import read_manifest, write_manifest
from offtower.data.outcomes import stored_schema
from offtower.data.parts import write_log_parts
from offtower.data.round_tables import whole_round_tables
from offtower.data.schema import LogSchema
from offtower.data.source import CheckedUnits, Source, UnitTally
from offtower.errors import DataError
from offtower.execution import Execution
from offtower.progress import Progress, report_rows


def write_rows(out: Location, rows: CheckedUnits, execution: Execution) -> UnitTally:
    """Write `out`; what was written, and what was set aside or left out."""
    mapper, progress = execution.mapper, execution.progress
    units = rows.units
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
    if rows.quarantine is not None or rows.schema.outcomes is not None:
        progress.start("checking rows", int(counted.sum()))
        tallies = list(
            report_rows(mapper.map(rows.tally, range(len(units)), "checking rows"), progress)
        )
        progress.finish()
        found = sum(tallies, UnitTally(0, 0))
        rows.counts = np.asarray([one.good for one in tallies], dtype=np.int64)
    _check_some_mature(found, rows.schema)
    write_log_parts(out, rows, stored_schema(rows.schema), execution, task="writing rows")
    return found


def mark_single_draws(path: Location) -> None:
    """Write pscore_kind marginal for a log of slates whose rounds all show one item.

    Without items above, conditional and slate propensities are marginal ones, and all that single
    draws permit (such as objective auto) holds for the log.
    """
    log = ParquetLog.open(path)
    manifest = read_manifest(path)
    if manifest is None or not log.schema.slates or not one_item_a_round(log):
        return
    schema = replace(log.schema, pscore_kind="marginal")
    fingerprint = ParquetLog.open(path, schema).fingerprint
    write_manifest(path, schema.to_dict(), log.num_rows, fingerprint, manifest["files"])


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
