"""Draw a log from a simulated recommender whose every probability is known.

Writes OUT/catalogue and OUT/train, OUT/validation, OUT/test. A million items need no rounds x items
array; the logged propensities are exact. --slate logs slates, drawn without replacement, with the
propensity of each item given those above it. --eligible restricts which items may be shown.

\b
Example:
  offtower simulate --items 10000 --rows 100000 --out logs/simulated
  offtower simulate --items 1000 --beta -1 --beta 2 --out logs/two-policies
  offtower simulate --slate 5 --eligible regions=20 --out logs/slates
  offtower simulate --items 200 --drift trend=1 --drift week=0.5 --out logs/drift
  offtower simulate --items 1000 --history 10 --out logs/histories
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from offtower.cli.cluster import IN_PROCESS, RayOptions
from offtower.cli.common import AsJson, DrawnProgress, messages, print_json, verb
from offtower.errors import DataError

_PARTS = {"train": 1.0, "validation": 0.2, "test": 0.2}
"""Rows of each part as a share of --rows."""


@verb
def simulate(
    out: Annotated[str, typer.Option(help="New folder, or its address (s3://...).")],
    items: Annotated[int, typer.Option(min=1, help="Items in the catalogue.")] = 10_000,
    rows: Annotated[int, typer.Option(min=5, help="Rows of the training log.")] = 100_000,
    dim: Annotated[int, typer.Option(min=1, help="Width of context and item vectors.")] = 8,
    beta: Annotated[
        list[float] | None,
        typer.Option(
            help="Inverse temperature of the logging policy (default 1); several values make a log "
            "of several behavior policies, with a column for each one's propensities."
        ),
    ] = None,
    epsilon: Annotated[
        float, typer.Option(help="Share of uniform draws in the logging policy.")
    ] = 0.1,
    features: Annotated[
        Literal["vector", "all"], typer.Option(help="Only vectors, or every kind of feature.")
    ] = "vector",
    slate: Annotated[
        int | None, typer.Option(min=1, help="Items of a round; --rows still counts rows.")
    ] = None,
    structure: Annotated[
        Literal["independent", "cascade", "standard"],
        typer.Option(
            help="What a reward in a slate depends on: its own item; also the items above; the "
            "whole slate."
        ),
    ] = "cascade",
    eligible: Annotated[
        list[str] | None,
        typer.Option(
            help="Restrict the items of a round: regions=R (and everywhere=P, the percentage of "
            "items that all regions have), days=D, seen=S or candidates=C; may be repeated.",
            metavar="FORM=NUMBER",
        ),
    ] = None,
    drift: Annotated[
        list[str] | None,
        typer.Option(
            help="Change over six weeks: trend=H, step=H (in the middle) or week=H (on weekends) "
            "move the logits of rewards, logging=F multiplies the logging policy's inverse "
            "temperature in the second half; may be repeated.",
            metavar="FORM=NUMBER",
        ),
    ] = None,
    history: Annotated[
        int | None,
        typer.Option(
            min=1, help="Give contexts histories of up to so many items, on which rewards depend."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    ray: RayOptions = IN_PROCESS,
    as_json: AsJson = False,
) -> None:
    from offtower.data import write_catalogue
    from offtower.data.location import Location
    from offtower.data.output import check_new
    from offtower.data.simulate import (
        HistorySettings,
        LoggingPolicy,
        SimulatedWorld,
        SlateSettings,
        WorldSettings,
        logging_value,
        logging_value_of_week,
        parse_drift,
        parse_eligibility,
        propensity_column,
        write_simulated_log,
    )
    from offtower.data.simulate.drift import WEEKS

    folder = Location.of(out)
    if folder.local is None:
        for name in ("catalogue", *_PARTS):
            check_new(folder / name)
    elif folder.exists() and any(folder.local.iterdir()):
        raise DataError(f"'{out}' is not empty; choose another --out")
    betas = beta or [1.0]
    policies = {
        f"logging-{number}": LoggingPolicy("contextual", one, epsilon)
        for number, one in enumerate(betas, start=1)
    }
    changes = None if drift is None else parse_drift(drift)
    behavior = "the logging policy" if len(policies) == 1 else "logging-1"
    world = SimulatedWorld(
        items,
        WorldSettings(
            *(dim, dim, dim),
            feature_kinds=features,
            drift=changes,
            history=None if history is None else HistorySettings(history),
        ),
        seed=seed,
        logging=next(iter(policies.values())),
        slate=None if slate is None else SlateSettings(slate, structure),
        eligible=None if eligible is None else parse_eligibility(eligible),
    )
    write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
    rounds = {
        name: max(1, round(rows * share / world.slate_size)) for name, share in _PARTS.items()
    }
    several = policies if len(policies) > 1 else None
    with ray.execution(DrawnProgress()) as execution:
        for number, (name, count) in enumerate(rounds.items(), start=1):
            write_simulated_log(
                world,
                folder / name,
                count,
                seed=number,
                policies=several,
                execution=execution,
                task=f"drawing {name}",
            )
    counts = {name: count * world.slate_size for name, count in rounds.items()}
    facts: dict[str, Any] = {
        "catalogue": str(folder / "catalogue"),
        "items": items,
        "rows": counts,
    }
    columns = {name: propensity_column(name) for name in several or ()}
    if columns:
        facts["logging_columns"] = columns
    value = None if slate is None and eligible is None else logging_value(world)
    if value is not None:
        facts["logging_value"] = {"value": value.value, "std_error": value.std_error}
    weeks = [] if drift is None else [logging_value_of_week(world, i) for i in range(WEEKS + 1)]
    if weeks:
        facts["logging_value_by_week"] = weeks
    if as_json:
        print_json(facts)
        return
    console = messages()
    console.print(f"{items:,} items in {folder / 'catalogue'}")
    for name, count in counts.items():
        console.print(f"{count:,} rows in {folder / name}")
    if value is not None:
        console.print(
            f"value of {behavior} in new contexts: {value.value:.5f} ± {value.std_error:.5f} "
            "(expected sum of a round's rewards, standard error)"
        )
    if weeks:
        shown = ", ".join(f"{value:.5f}" for value in weeks)
        console.print(f"value of {behavior} by week, and in the week after: {shown}")
    if columns:
        named = ", ".join(f"{name}: {column}" for name, column in columns.items())
        console.print(
            "behavior policies and the columns of their propensities, for --select heuristic: "
            f"evaluation.selection.logging_columns={{{named}}}",
            soft_wrap=True,
        )
