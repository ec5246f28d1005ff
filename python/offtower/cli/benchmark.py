"""Measure operators (ops, eligible), training (train, memory), learning or verdicts.

\b
Example:
  offtower benchmark ops --items 200000 --dim 64 --batch 256
  offtower benchmark eligible --items 1000000 --dim 64
  offtower benchmark train --items 10000 --items 1000000 --dim 32
  offtower benchmark quality --config configs/quality/table.yaml --out results/table
  offtower benchmark validity --quick --out results/validity-quick
  offtower benchmark million --items 1000000 --rows 1000000 --minutes 5 --out results/million
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offtower.cli.common import AsJson, escape, messages, print_json, verb
from offtower.jsonable import finite


@verb
def benchmark(
    suite: Annotated[
        str,
        typer.Argument(
            help="ops, eligible, train, memory, quality, validity or million.", metavar="SUITE"
        ),
    ],
    items: Annotated[
        list[int] | None,
        typer.Option("--items", help="Items of the catalogue; may be given several times.", min=2),
    ] = None,
    dim: Annotated[int, typer.Option("--dim", help="Width of the embeddings.", min=1)] = 32,
    batch: Annotated[int, typer.Option("--batch", help="Rows of a batch.", min=2)] = 1024,
    steps: Annotated[
        int, typer.Option("--steps", help="Batches of an epoch, or calls.", min=1)
    ] = 20,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Also run other packages' trainers.")
    ] = True,
    config: Annotated[
        Path | None, typer.Option("--config", help="quality: worlds, methods, seeds (YAML).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="quality, validity, million: folder of results; goes on there."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="quality: PREFIX of PREFIX-train.npz and PREFIX-test.npz."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            help="quality, validity: begin nothing new after so long; million: of a method (5).",
        ),
    ] = None,
    cells: Annotated[
        list[str] | None,
        typer.Option("--cells", help="validity: pattern of cells, such as 'heavy-*'; repeatable."),
    ] = None,
    logs: Annotated[
        int | None, typer.Option("--logs", help="validity: logs of each cell (1,000).", min=2)
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="validity: four cells of ten logs; million: 3 s of training each (auto: 20).",
        ),
    ] = False,
    rows: Annotated[
        int | None, typer.Option("--rows", help="million: rows of the log (1,000,000).", min=100)
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="million: worlds of each kind.", min=1)] = 1,
    world: Annotated[
        list[str] | None,
        typer.Option("--world", help="million: features, ids or both; repeatable."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="million: a learner; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    from offtower.benchmarks import Settings, load_suite

    console = messages()
    run = load_suite(suite)
    settings = Settings(
        items=tuple(items or (() if suite == "million" else (10_000, 100_000))),
        dim=dim,
        batch=batch,
        steps=steps,
        peers=peers,
        config=config,
        out=out,
        data=data,
        minutes=minutes,
        cells=tuple(cells or ()),
        logs=logs,
        quick=quick,
        rows=rows,
        seeds=seeds,
        worlds=tuple(world or ()),
        methods=tuple(method or ()),
        say=lambda text: console.print(escape(text), soft_wrap=True),
    )
    result = run(settings)
    if as_json:
        print_json(finite(result))
