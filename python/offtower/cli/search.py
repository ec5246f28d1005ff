"""Search an export, or draw from the policy with known propensities.

--contexts is a file (CSV, TSV, JSON Lines, Parquet, Arrow), a folder of them, or one context as
JSON. Files are read, answered and printed a thousand contexts at a time.

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
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from offtower.cli.common import AsJson, DrawnProgress, TrustCode, escape, messages, verb
from offtower.errors import DataError
from offtower.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

    from offtower.data.location import Location
    from offtower.data.unknown import UnknownValues
    from offtower.retrieval import Retriever, SampleResult, SearchResult

Mode = Literal["softmax", "cells", "exact"]
OnEmpty = Literal["error", "skip"]
Row = dict[str, Any]
Answer = TypeVar("Answer")
Write = Callable[[list[Row] | None], None]
"""Prints rows; None ends the output."""

_BATCH = 1000
"""Contexts per batch."""


@verb
def search(
    run: Annotated[Path, typer.Argument(help="Run directory or export.", metavar="RUN")],
    contexts: Annotated[str, typer.Option(help="File, folder, or one context as JSON.")],
    k: Annotated[
        int | None, typer.Option("-k", help="Items per context: 100; serving.k with --sample.")
    ] = None,
    sample: Annotated[
        bool,
        typer.Option("--sample", help="Serve: draw from the served policy, with propensities."),
    ] = False,
    mode: Annotated[
        Mode, typer.Option(help="How to draw; see docs/reference/retrieval.md.")
    ] = "softmax",
    exclude: Annotated[
        str | None, typer.Option(help="Comma-separated ids of items to leave out.")
    ] = None,
    on_empty: Annotated[
        OnEmpty,
        typer.Option(
            help="For a context that may be shown no item: stop with an error, or skip it, which "
            "shows nothing and is counted."
        ),
    ] = "error",
    exact: Annotated[bool, typer.Option("--exact", help="Score every item.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    log: Annotated[
        str | None, typer.Option(help="Parquet file for the decisions of --sample.")
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option(help="YAML whose section `format` says how the contexts' files are written."),
    ] = None,
    trust_code: TrustCode = None,
    as_json: AsJson = False,
) -> None:
    import numpy as np

    _skip_pandas()
    from offtower.cli.ingest import read_formats
    from offtower.data.location import Location
    from offtower.data.unknown import UnknownValues
    from offtower.retrieval import Retriever
    from offtower.retrieval.contexts import read_contexts

    if log is not None and not sample:
        raise DataError("--log writes decisions with propensities: it needs --sample")
    target = None if log is None else Location.of(log)
    if target is not None and target.exists():
        raise DataError(f"'{log}' exists already; choose another --log")
    retriever = Retriever.open(run)
    for note in _notes(run, retriever, sample=sample):
        messages().print(f"[yellow]note[/]: {escape(note)}", soft_wrap=True)
    if k is None:
        k = retriever.serving.k if sample else min(100, retriever.num_items)
    unknown, answered = UnknownValues(), _Counts(k)
    excluded = None if exclude is None else _ids(exclude, retriever)
    written = None if schema is None else read_formats(schema).contexts
    read = _in_time(read_contexts(contexts, retriever, written, rows=_BATCH), retriever, answered)
    tables = _counted(read, retriever, unknown)
    if sample:
        rng = np.random.default_rng(seed)
        draw = partial(
            retriever.sample, k=k, mode=mode, exclude=excluded, seed=rng, on_empty=on_empty
        )
        answers = _sample(retriever, _numbered(draw), tables, target)
    else:
        find = partial(retriever.search, k=k, exclude=excluded, exact=exact, on_empty=on_empty)
        answers = _search(_numbered(find), tables)
    # No progress bar on a terminal that shows the results.
    progress = DrawnProgress() if as_json or not sys.stdout.isatty() else Progress()
    progress.start("contexts", None)
    write = _as_json(retriever.version, unknown, answered) if as_json else _as_text()
    try:
        for rows in answers:
            write(rows)
            answered.add(rows)
            progress.advance(len(rows))
    finally:
        progress.finish()
    write(None)
    for sentence in [*unknown.sentences("contexts"), *answered.sentences()]:
        messages().print(f"[yellow]note[/]: {escape(sentence)}", soft_wrap=True)
    if target is not None:
        from offtower.data.join.files import schema_beside

        beside = escape(str(schema_beside(target)))
        messages().print(
            f"decisions in {escape(str(log))} with their schema {beside}; add outcomes with "
            "offtower join, then ingest",
            soft_wrap=True,
        )


@dataclass
class _Counts:
    """Contexts that were answered with fewer than k items, or read without some events.

    shorter: with some items. empty: with none. late: events of histories that were dropped.
    """

    k: int
    shorter: int = 0
    empty: int = 0
    late: int = 0

    def add(self, rows: list[Row]) -> None:
        lengths = [len(row["items"]) for row in rows]
        self.empty += lengths.count(0)
        self.shorter += sum(0 < length < self.k for length in lengths)

    def sentences(self) -> list[str]:
        """Notes for the user."""
        found = []
        if self.shorter:
            found.append(
                f"{self.shorter:,} contexts have fewer than {self.k} items: no others may be shown"
            )
        if self.empty:
            found.append(
                f"{self.empty:,} contexts have no item that may be shown; nothing is logged for "
                "them"
            )
        if self.late:
            found.append(
                f"{self.late:,} events of histories are at the time of their row or later, and are "
                "left out"
            )
        return found


class _NoPandas(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "pandas":
            raise ImportError("a search has no use for pandas")


def _skip_pandas() -> None:
    """Keep pyarrow's first array from importing pandas, which takes half a second.

    pyarrow looks once for pandas, to recognize its objects. A search has none.
    """
    if "pandas" in sys.modules:
        return
    import pyarrow as pa

    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([])
    finally:
        sys.meta_path.remove(finder)


def _notes(run: Path, retriever: Retriever, *, sample: bool) -> list[str]:
    """What a user should know where results are not those of the served policy of the run."""
    from offtower.run_directory import RunDirectory

    notes = []
    directory = RunDirectory(run)
    if directory.config_path.exists():
        serving = directory.load_config().serving
        if serving != retriever.serving:
            notes.append(
                f"the run's section serving ({serving.text}) has changed since it was exported "
                f"({retriever.serving.text}): export again to serve what is evaluated"
            )
    if not sample and retriever.serving.mode == "sample":
        notes.append(
            "these are the best items; 'offtower evaluate' reports the served policy, which draws "
            "(--sample). To serve the best items always, set serving.mode to top_k"
        )
    return notes


def _in_time(
    tables: Iterable[pa.Table], retriever: Retriever, counts: _Counts
) -> Iterator[pa.Table]:
    """The contexts without events of histories that are later than they are, which are counted."""
    from offtower.data.histories import without_late_events

    encoding = retriever.tower.encoding
    for table in tables:
        kept, late = without_late_events(table, encoding.specs, encoding.timestamp)
        counts.late += late
        yield kept


def _counted(
    tables: Iterable[pa.Table], retriever: Retriever, unknown: UnknownValues
) -> Iterator[pa.Table]:
    """The contexts; after each table is answered, its unknown values are counted."""
    for table in tables:
        yield table
        unknown.add_table(retriever.tower.encoding, table)


def _numbered(answer: Callable[..., Answer]) -> Callable[..., Answer]:
    """Answer table after table, with errors that say which contexts a table holds."""
    first = 0

    def answered(table: pa.Table, **options: Any) -> Answer:
        nonlocal first
        try:
            found = answer(table, **options)
        except DataError as error:
            if first == 0:
                raise
            raise DataError(f"counting from context {first:,} as 0: {error}") from error
        first += table.num_rows
        return found

    return answered


def _search(
    find: Callable[[pa.Table], SearchResult], tables: Iterable[pa.Table]
) -> Iterator[list[Row]]:
    for table in tables:
        found = find(table)
        yield [
            {"items": ids, "score": score.tolist()}
            for ids, score in zip(found.item_id, found.score, strict=True)
        ]


def _sample(
    retriever: Retriever,
    draw: Callable[..., SampleResult],
    tables: Iterable[pa.Table],
    log: Location | None,
) -> Iterator[list[Row]]:
    """Draw in batches; the log appears when it is complete."""
    import pyarrow.parquet as pq
    import yaml

    from offtower.data.join.files import schema_beside
    from offtower.data.output import new_file
    from offtower.retrieval import catalogue_section, decisions_table, served_schema

    now = datetime.now(UTC)
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        file = None if log is None else stack.enter_context(new_file(log))
        served: SampleResult | None = None
        for table in tables:
            served = draw(table, at=now)
            if file is not None:
                decisions = decisions_table(retriever, table, served, served_at=now)
                if writer is None:
                    writer = pq.ParquetWriter(file, decisions.schema)
                    stack.callback(writer.close)
                writer.write_table(decisions)
            yield [
                {
                    "items": ids,
                    "pscore": pscore[: len(ids)].tolist(),
                    "relative_error": error[: len(ids)].tolist(),
                }
                for ids, pscore, error in zip(
                    served.item_id, served.pscore, served.relative_error, strict=True
                )
            ]
        if log is not None:
            # The schema comes first, so that a log is never without it.
            content = {
                "log": served_schema(retriever, served).to_dict(),
                "catalogue": catalogue_section(retriever).to_dict(),
            }
            text = yaml.safe_dump(content, sort_keys=False)
            schema_beside(log).write_bytes(text.encode())


def _as_text() -> Write:
    number = 0

    def write(rows: list[Row] | None) -> None:
        nonlocal number
        for row in rows or []:
            typer.echo(f"context {number}")
            number += 1
            for position, item in enumerate(row["items"]):
                if "pscore" in row:
                    error = row["relative_error"][position]
                    accuracy = "exact" if error == 0.0 else f"± {100 * error:.2g} %"
                    result = f"pscore {row['pscore'][position]:.6g} {accuracy}"
                else:
                    result = f"score {row['score'][position]:.4f}"
                typer.echo(f"  {position + 1:>4}  {_printable(item)}  {result}")

    return write


def _printable(item: Any) -> str:
    """An id on one line: as JSON where it holds control characters, which could forge output."""
    text = str(item)
    if text.isprintable() and not text.startswith('"'):
        return text
    return json.dumps(text).replace("\x7f", "\\u007f")


def _as_json(version: str, unknown: UnknownValues, answered: _Counts) -> Write:
    """One JSON object, written row by row; counts come last."""
    begun = False

    def write(rows: list[Row] | None) -> None:
        nonlocal begun
        for row in rows or []:
            head = "," if begun else f'{{"version": {json.dumps(version)}, "contexts": ['
            typer.echo(f"{head}\n{json.dumps(row, allow_nan=False)}", nl=False)
            begun = True
        if rows is None:
            counts = {"shorter": answered.shorter, "empty": answered.empty}
            if answered.late:
                counts["late_events"] = answered.late
            typer.echo(
                f'\n], "rounds": {json.dumps(counts)}, '
                f'"unknown_values": {json.dumps(unknown.to_dict())}}}'
            )

    return write


def _ids(text: str, retriever: Retriever) -> list[Any]:
    ids = [part.strip() for part in text.split(",") if part.strip()]
    if retriever.manifest["vectors"]["text_ids"]:
        return ids
    try:
        return [int(part) for part in ids]
    except ValueError:
        raise DataError(f"--exclude '{text}': this export's ids are integers") from None
