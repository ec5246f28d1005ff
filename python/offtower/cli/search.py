"""Search an export, or draw from the policy with known propensities.

--contexts is a file (CSV, Parquet, Arrow), a folder of them, or one context as JSON. Files are
read, answered and printed a thousand contexts at a time.

\b
Example:
  offtower search runs/mine --contexts '{"age": 31, "country": "fr"}' -k 10
  offtower search runs/mine --contexts today.parquet -k 5 --sample --log served/today.parquet
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from offtower.cli.common import AsJson, DrawnProgress, TrustCode, escape, messages, verb
from offtower.errors import DataError
from offtower.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

    from offtower.data.location import Location
    from offtower.retrieval import Retriever

Mode = Literal["softmax", "cells", "exact"]
Row = dict[str, Any]
Write = Callable[[list[Row] | None], None]
"""Prints rows; None ends the output."""

_BATCH = 1000
"""Contexts answered at a time."""


@verb
def search(
    run: Annotated[Path, typer.Argument(help="Run directory or export.", metavar="RUN")],
    contexts: Annotated[str, typer.Option(help="File, folder, or one context as JSON.")],
    k: Annotated[
        int | None, typer.Option("-k", help="Items a context: 100, or 1 with --sample.")
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw a slate from the policy, with propensities.")
    ] = False,
    mode: Annotated[Mode, typer.Option(help="How to draw; see docs/retrieval.md.")] = "softmax",
    exclude: Annotated[
        str | None, typer.Option(help="Item ids that must not be shown, with commas.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Score every item.")] = False,
    seed: Annotated[int | None, typer.Option(help="Repeats draws.")] = None,
    log: Annotated[
        str | None, typer.Option(help="Parquet file for the decisions of --sample.")
    ] = None,
    trust_code: TrustCode = None,
    as_json: AsJson = False,
) -> None:
    from offtower.data.location import Location
    from offtower.retrieval import Retriever

    if log is not None and not sample:
        raise DataError("--log writes decisions with propensities: it needs --sample")
    place = None if log is None else Location.of(log)
    if place is not None and place.exists():
        raise DataError(f"'{log}' exists already; choose another --log")
    retriever = Retriever.open(run)
    if k is None:
        k = 1 if sample else min(100, retriever.num_items)
    hidden = None if exclude is None else _ids(exclude, retriever)
    if sample:
        answers = _drawn(retriever, contexts, k, mode, hidden, seed, place)
    else:
        answers = _found(retriever, contexts, k, hidden, exact)
    # Bars and lines for people do not go to the same terminal.
    progress = DrawnProgress() if as_json or not sys.stdout.isatty() else Progress()
    progress.start("contexts", None)
    write = _as_json(retriever.version) if as_json else _as_text()
    try:
        for rows in answers:
            write(rows)
            progress.advance(len(rows))
    finally:
        progress.finish()
    write(None)
    if place is not None:
        schema = escape(str(_schema_path(place)))
        messages().print(f"decisions in {log}; add rewards and ingest with {schema}")


def _found(
    retriever: Retriever, contexts: str, k: int, hidden: list[Any] | None, exact: bool
) -> Iterator[list[Row]]:
    for table in _batches(contexts):
        found = retriever.search(table, k, exclude=hidden, exact=exact)
        yield [
            {"items": ids, "score": score.tolist()}
            for ids, score in zip(found.item_id, found.score, strict=True)
        ]


def _drawn(
    retriever: Retriever,
    contexts: str,
    k: int,
    mode: Mode,
    hidden: list[Any] | None,
    seed: int | None,
    log: Location | None,
) -> Iterator[list[Row]]:
    """Draws a batch at a time; the log appears when the last one is in it."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    from offtower.data.output import new_file
    from offtower.retrieval import decisions_table, served_schema

    rng, now, first = np.random.default_rng(seed), datetime.now(UTC), 0
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        place = None if log is None else stack.enter_context(new_file(log))
        for table in _batches(contexts):
            served = retriever.sample(table, k, mode=mode, exclude=hidden, seed=rng)
            if place is not None:
                numbers = range(first, first + table.num_rows)
                rounds = pa.array([f"{now:%Y%m%dT%H%M%S%f}-{row}" for row in numbers])
                decisions = decisions_table(
                    retriever, table, served, round_id=rounds, served_at=now
                )
                if writer is None:
                    writer = pq.ParquetWriter(place, decisions.schema)
                    stack.callback(writer.close)
                writer.write_table(decisions)
            first += table.num_rows
            yield [
                {"items": ids, "pscore": pscore.tolist(), "relative_error": error.tolist()}
                for ids, pscore, error in zip(
                    served.item_id, served.pscore, served.relative_error, strict=True
                )
            ]
        if log is not None:
            # The schema first: where the decisions are, so is what ingests them.
            content = {"log": served_schema(retriever).to_dict()}
            text = yaml.safe_dump(content, sort_keys=False)
            _schema_path(log).write_bytes(text.encode())


def _schema_path(log: Location) -> Location:
    return log.parent / f"{PurePosixPath(log.name).stem}.schema.yaml"


def _as_text() -> Write:
    number = 0

    def write(rows: list[Row] | None) -> None:
        nonlocal number
        for row in rows or []:
            typer.echo(f"context {number}")
            number += 1
            for place, item in enumerate(row["items"]):
                if "pscore" in row:
                    error = row["relative_error"][place]
                    known = "exact" if error == 0.0 else f"± {100 * error:.2g} %"
                    shown = f"pscore {row['pscore'][place]:.6g} {known}"
                else:
                    shown = f"score {row['score'][place]:.4f}"
                typer.echo(f"  {place + 1:>4}  {item}  {shown}")

    return write


def _as_json(version: str) -> Write:
    """One JSON object, its rows written as they come."""
    begun = False

    def write(rows: list[Row] | None) -> None:
        nonlocal begun
        for row in rows or []:
            head = "," if begun else f'{{"version": {json.dumps(version)}, "contexts": ['
            typer.echo(f"{head}\n{json.dumps(row, allow_nan=False)}", nl=False)
            begun = True
        if rows is None:
            typer.echo("\n]}")

    return write


def _ids(text: str, retriever: Retriever) -> list[Any]:
    ids = [part.strip() for part in text.split(",") if part.strip()]
    if retriever.manifest["vectors"]["text_ids"]:
        return ids
    try:
        return [int(part) for part in ids]
    except ValueError:
        raise DataError(f"--exclude '{text}': this export's ids are integers") from None


def _batches(text: str) -> Iterator[pa.Table]:
    """Contexts, _BATCH at a time; a file is not read as a whole."""
    import pyarrow as pa

    from offtower.data.source import Units, open_source

    if text.lstrip().startswith(("{", "[")):
        try:
            content = json.loads(text)
            table = pa.Table.from_pylist(content if isinstance(content, list) else [content])
        except (json.JSONDecodeError, pa.ArrowInvalid, AttributeError, TypeError) as error:
            raise DataError(f"--contexts is not valid JSON of contexts: {error}") from error
        source: Iterable[pa.RecordBatch] = table.to_batches(max_chunksize=_BATCH)
    else:
        opened = open_source(text)
        units = Units(opened, text, opened.schema.names)
        source = chain.from_iterable(
            units.batches(unit, most_rows=_BATCH) for unit in range(len(units))
        )
    some = False
    try:
        for batch in source:
            if batch.num_rows:
                some = True
                yield pa.Table.from_batches([batch])
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"the contexts in '{text}' cannot be read: {error}") from error
    if not some:
        raise DataError("--contexts has no rows")
