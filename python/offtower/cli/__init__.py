"""The command line: one small file a verb."""

from __future__ import annotations

import typer

from offtower.cli import (
    benchmark,
    doctor,
    evaluate,
    export,
    ingest,
    quickstart,
    search,
    simulate,
    train,
    tune,
    validate,
)

app = typer.Typer(
    name="offtower",
    help="Learn two-tower retrieval policies from logged feedback, and evaluate them offline.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for verb in (
    doctor,
    simulate,
    ingest,
    validate,
    train,
    tune,
    evaluate,
    export,
    search,
    benchmark,
    quickstart,
):
    name = verb.__name__.rsplit(".", 1)[-1]
    app.command(name, help=verb.__doc__)(getattr(verb, name))


def main() -> None:
    """Entry point of the `offtower` command."""
    app()
