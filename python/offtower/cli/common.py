"""Options, messages, error handling and progress bars of all verbs."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, get_type_hints

import typer

from offtower.errors import OfftowerError, StoppedError
from offtower.imports import TRUST_CODE, trusted_names
from offtower.interruption import Terminated
from offtower.paths import redact
from offtower.progress import DrawnProgress

# rich is imported where something is printed, so that --help does not wait for it.
if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "AsJson",
    "DrawnProgress",
    "Overrides",
    "TrustCode",
    "escape",
    "messages",
    "print_json",
    "verb",
]

EXIT_OK = 0
EXIT_REFUSED = 2
"""Bad input."""
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
"""By SIGTERM; training has written a checkpoint."""

AsJson = Annotated[
    bool, typer.Option("--json", help="Print only one JSON object on standard output.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. training.epochs=5."),
]
TrustCode = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-code",
        metavar="MODULE:CLASS",
        help="Run this code if a stored run names it; may be repeated. The environment variable "
        "OFFTOWER_TRUST_CODE does the same.",
    ),
]

P = ParamSpec("P")
R = TypeVar("R")


def messages() -> Console:
    """Return a console on standard error, which leaves standard output to results."""
    from rich.console import Console

    # rich would cut tables and wrap lines at 80 columns in a pipe.
    width = None if sys.stderr.isatty() else 240
    return Console(stderr=True, highlight=False, width=width)


def print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=2, sort_keys=True, default=str, allow_nan=False))


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Print errors for users as one message with exit code 2; SIGINT exits with 130, SIGTERM with
    143 where the verb handles it.

    The argument `trust_code` applies while the function runs, on its workers too. A parameter whose
    type is a dataclass of options, such as `RayOptions`, becomes an option per field.
    """
    signature, groups = _with_option_groups(function)

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, kind in groups.items():
            given = {one.name: kwargs.pop(one.name) for one in fields(kind) if one.name in kwargs}
            kwargs[name] = kind(**given)
        try:
            with _trusting(kwargs.get("trust_code")):
                return function(*args, **kwargs)
        except OfftowerError as error:
            if kwargs.get("as_json"):
                print_json({"error": type(error).__name__, "message": redact(str(error))})
            if isinstance(error, StoppedError):
                messages().print(str(error))
                raise typer.Exit(EXIT_TERMINATED) from None
            _print_error(str(error))
            raise typer.Exit(EXIT_REFUSED) from None
        except OSError as error:
            if error.errno is None:
                raise
            place = f" ({error.filename})" if error.filename else ""
            _print_error(os.strerror(error.errno) + place)
            raise typer.Exit(EXIT_REFUSED) from None
        except KeyboardInterrupt as interrupt:
            messages().print("interrupted; finished files are complete, use 'train --resume'")
            terminated = isinstance(interrupt, Terminated)
            raise typer.Exit(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED) from None

    wrapped.__signature__ = signature  # type: ignore[attr-defined]
    return wrapped


def _with_option_groups(
    function: Callable[..., Any],
) -> tuple[inspect.Signature, dict[str, type[Any]]]:
    """The signature with every dataclass replaced by its fields, and these dataclasses by name."""
    hints = get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    groups = {
        name: kind for name, kind in hints.items() if isinstance(kind, type) and is_dataclass(kind)
    }
    parameters: list[inspect.Parameter] = []
    for one in signature.parameters.values():
        if one.name not in groups:
            parameters.append(one.replace(annotation=hints[one.name], kind=one.KEYWORD_ONLY))
            continue
        kinds = get_type_hints(groups[one.name], include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, one.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name]
            )
            for field in fields(groups[one.name])
        ]
    return signature.replace(parameters=parameters), groups


@contextmanager
def _trusting(names: Any) -> Iterator[None]:
    """Add `names` to OFFTOWER_TRUST_CODE, which workers get too, until the block ends."""
    before = os.environ.get(TRUST_CODE)
    if names:
        os.environ[TRUST_CODE] = ",".join(sorted(trusted_names(names)))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(TRUST_CODE, None)
        else:
            os.environ[TRUST_CODE] = before


def _print_error(text: str) -> None:
    """Print a message without credentials and terminal control characters."""
    plain = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in redact(text))
    messages().print(f"[bold red]error[/]: {escape(plain)}", soft_wrap=True)


def escape(text: str) -> str:
    from rich.markup import escape as rich_escape

    return rich_escape(text)
