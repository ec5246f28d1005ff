"""Search an export, or draw from the policy with known propensities.

--contexts is a file (CSV, Parquet, Arrow), a folder of them, or one context as JSON.

\b
Example:
  offtower search runs/mine --contexts '{"age": 31, "country": "fr"}' -k 10
  offtower search runs/mine --contexts today.parquet -k 5 --sample --log served/today.parquet
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from offtower.cli.common import AsJson, escape, messages, print_json, verb
from offtower.errors import DataError


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
    mode: Annotated[
        Literal["softmax", "cells", "exact"],
        typer.Option(help="How to draw; see docs/retrieval.md."),
    ] = "softmax",
    exclude: Annotated[
        str | None, typer.Option(help="Item ids that must not be shown, with commas.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Score every item.")] = False,
    seed: Annotated[int | None, typer.Option(help="Repeats draws.")] = None,
    log: Annotated[
        Path | None, typer.Option(help="Parquet file for the decisions of --sample.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    from offtower.atomic import write_bytes, write_text
    from offtower.retrieval import Retriever, decisions_table, served_schema

    if log is not None and not sample:
        raise DataError("--log writes decisions with propensities: it needs --sample")
    if log is not None and log.exists():
        raise DataError(f"'{log}' exists already; choose another --log")
    retriever = Retriever.open(run)
    table = _contexts(contexts)
    if k is None:
        k = 1 if sample else min(100, retriever.num_items)
    hidden: list[Any] | None = None
    if exclude:
        hidden = [part.strip() for part in exclude.split(",") if part.strip()]
        if not retriever.manifest["vectors"]["text_ids"]:
            try:
                hidden = [int(part) for part in hidden]
            except ValueError:
                raise DataError(f"--exclude '{exclude}': this export's ids are integers") from None
    rows: list[dict[str, Any]] = []
    if sample:
        served = retriever.sample(table, k, mode=mode, exclude=hidden, seed=seed)
        for ids, pscore, error in zip(
            served.item_id, served.pscore, served.relative_error, strict=True
        ):
            rows.append({"items": ids, "pscore": pscore.tolist(), "relative_error": error.tolist()})
        if log is not None:
            # The schema first: where the decisions are, so is what ingests them.
            schema = log.with_suffix(".schema.yaml")
            content = {"log": served_schema(retriever).to_dict()}
            write_text(schema, yaml.safe_dump(content, sort_keys=False))
            buffer = pa.BufferOutputStream()
            pq.write_table(decisions_table(retriever, table, served), buffer)
            write_bytes(log, buffer.getvalue().to_pybytes())
    else:
        found = retriever.search(table, k, exclude=hidden, exact=exact)
        for ids, score in zip(found.item_id, found.score, strict=True):
            rows.append({"items": ids, "score": score.tolist()})
    if as_json:
        print_json({"version": retriever.version, "contexts": rows})
        return
    for number, row in enumerate(rows):
        typer.echo(f"context {number}")
        for place, item in enumerate(row["items"]):
            if sample:
                shown = f"pscore {row['pscore'][place]:.6g} ± {row['relative_error'][place]:.2%}"
            else:
                shown = f"score {row['score'][place]:.4f}"
            typer.echo(f"  {place + 1:>4}  {item}  {shown}")
    if log is not None:
        messages().print(f"decisions in {log}; add rewards and ingest with {escape(str(schema))}")


def _contexts(text: str) -> Any:
    import pyarrow as pa

    from offtower.data.ingest import open_source

    if text.lstrip().startswith(("{", "[")):
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"--contexts is not valid JSON: {error}") from error
        table = pa.Table.from_pylist(content if isinstance(content, list) else [content])
    else:
        table = open_source(Path(text)).to_table()
    if table.num_rows == 0:
        raise DataError("--contexts has no rows")
    return table
