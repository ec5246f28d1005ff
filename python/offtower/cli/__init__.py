"""The command line, with one module per verb."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import offtower
from offtower.cli import (
    benchmark,
    doctor,
    embed,
    evaluate,
    experiment_plan,
    experiment_read,
    export,
    ingest,
    join,
    log_history,
    monitor,
    quickstart,
    search,
    serve,
    simulate,
    train,
    tune,
    tune_serving,
    validate,
)


class _Verbs(TyperGroup):
    """Finds verbs of two words: 'tune serving', 'log history'."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = " ".join(args[:2])
        if len(args) > 1 and name in self.commands:
            return name, self.commands[name], args[2:]
        longer = [name for name in self.commands if name.startswith(f"{args[0]} ")]
        if longer and args[0] not in self.commands:
            ctx.fail(f"'{args[0]}' needs a second word: {' or '.join(map(repr, longer))}.")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="offtower",
    cls=_Verbs,
    help="Learn two-tower retrieval policies from logged feedback, and evaluate them offline.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"offtower {offtower.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


for verb in (
    doctor,
    simulate,
    join,
    ingest,
    embed,
    validate,
    train,
    tune,
    tune_serving,
    evaluate,
    log_history,
    experiment_plan,
    experiment_read,
    export,
    search,
    serve,
    monitor,
    benchmark,
    quickstart,
):
    name = verb.__name__.rsplit(".", 1)[-1]
    app.command(name.replace("_", " "), help=verb.__doc__)(getattr(verb, name))


def main() -> None:
    """Entry point of the `offtower` command."""
    # Python processes that libraries start do not import from the working folder either.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    app()
