"""Write docs/reference/cli.md, config.md and schema.md from the code.

python tools/generate_reference.py           # write
python tools/generate_reference.py --check   # exit code 1 where a page is not up to date
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from offtower.cli import app
from offtower.config import Config
from offtower.data.eligible_schema import (
    AttributeForm,
    EligibleSchema,
    IntervalForm,
    ListForm,
)
from offtower.data.formats.options import FileFormat
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema, NamedReward, Outcomes

OUT = Path(__file__).resolve().parent.parent / "docs" / "reference"
NOTE = "<!-- Written by tools/generate_reference.py; do not edit. -->\n"


def command_line() -> str:
    """One section per verb: its help, its usage, its options."""
    group: Any = typer.main.get_command(app)
    parts = [NOTE, "# Command line\n", inspect.cleandoc(group.help or "") + "\n"]
    for name, command in group.commands.items():
        text, _, example = (
            inspect.cleandoc(command.help or "").replace("\b\n", "").partition("Example:")
        )
        parts.append(f"## offtower {name}\n")
        parts.append(text.strip() + "\n")
        usage = _usage(command)
        lines = [f"offtower {name} {usage}", *textwrap.dedent(example.strip("\n")).splitlines()]
        parts.append("```\n" + "\n".join(lines) + "\n```\n")
        rows = [_option(parameter) for parameter in command.params]
        parts.append(_table(("option", "meaning", "default"), [row for row in rows if row]))
    return "\n".join(parts)


def _option(parameter: Any) -> tuple[str, str, str] | None:
    if getattr(parameter, "hidden", False) or parameter.name == "help":
        return None
    if parameter.param_type_name == "argument":
        names = _metavar(parameter).strip("[]")
    else:
        names = ", ".join(parameter.opts + parameter.secondary_opts)
        if not parameter.is_flag:
            names += f" {_metavar(parameter)}"
    default = parameter.default
    shown = "required" if parameter.required else ""
    if not parameter.required and default not in (None, False, (), []) and not callable(default):
        shown = f"`{getattr(default, 'value', default)}`"
    return f"`{names}`", getattr(parameter, "help", "") or "", shown


def _metavar(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    kind = parameter.type_descriptor.annotation
    if typing.get_origin(kind) is typing.Literal:
        return "[" + "|".join(typing.get_args(kind)) + "]"
    kind = next(iter(typing.get_args(kind)), kind)
    return {int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(kind, kind.__name__.upper())


def _usage(command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    return " ".join(["[OPTIONS]", *map(_metavar, arguments)])


def configuration() -> str:
    """One section per configuration class, in the order of a file."""
    parts = [NOTE, "# Configuration\n"]
    parts.append(
        "A run is described by one YAML file. `--set section.key=value` overrides a key on the "
        "command line; an unknown key is an error that names the nearest known one.\n"
    )
    parts += _sections(Config, "")
    return "\n".join(parts)


def schema() -> str:
    """The sections of a schema file."""
    parts = [NOTE, "# Schema of a log and a catalogue\n"]
    parts.append(
        "`offtower ingest --schema FILE` reads a YAML file with a section `log` and, where items "
        "have features, a section `catalogue`; a section `format` says how text files write their "
        "values. A directory that offtower wrote has its schema.\n"
    )
    for title, kind in (
        ("log", LogSchema),
        ("log.outcomes", Outcomes),
        ("log.rewards", NamedReward),
        ("catalogue", CatalogueSchema),
        ("feature", FeatureSpec),
        ("log.eligible", EligibleSchema),
        ("log.eligible.attribute", AttributeForm),
        ("log.eligible.interval", IntervalForm),
        ("log.eligible.exclude, candidates", ListForm),
        ("format", FileFormat),
    ):
        parts += _section(kind, title)
    parts.append(
        "The keys of `format` hold for every file. The sections `format.log`, `format.catalogue`, "
        "`format.outcomes` and `format.contexts` override them for one.\n"
    )
    return "\n".join(parts)


def _sections(kind: Any, path: str) -> Iterator[str]:
    yield from _section(kind, path)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        for inner in _dataclasses(hints[field.name]):
            yield from _sections(inner, f"{path}.{field.name}" if path else field.name)


def _dataclasses(hint: Any) -> list[Any]:
    """The configuration classes inside a type."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for argument in typing.get_args(hint) for found in _dataclasses(argument)]


def _section(kind: Any, title: str) -> list[str]:
    hints = typing.get_type_hints(kind)
    texts = _attribute_docstrings(kind)
    rows = []
    for field in dataclasses.fields(kind):
        kind_of_key = _type(hints[field.name])
        key = getattr(field.default, "alias", None) or field.name
        rows.append((f"`{key}`", kind_of_key, _default(field), texts.get(field.name, "")))
    heading = f"## `{title}`\n" if title else "## Top level\n"
    return [
        heading,
        (inspect.getdoc(kind) or "") + "\n",
        _table(("key", "type", "default", "meaning"), rows),
    ]


def _type(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "section"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (tuple, list):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return "list of " + " and ".join(dict.fromkeys(_type(argument) for argument in inner))
    if origin is dict:
        return "mapping"
    if arguments:
        return " or ".join(_type(argument) for argument in arguments)
    if hint is type(None):
        return "null"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}.get(hint, "any")


def _default(field: Any) -> str:
    """The default and the limits of a field."""
    value, limits = field.default, ""
    if hasattr(value, "metadata") and hasattr(value, "default"):  # pydantic's FieldInfo
        limits = ", ".join(_limit(limit) for limit in value.metadata if _limit(limit))
        value = value.default_factory() if value.default_factory else value.default
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING or "Undefined" in type(value).__name__:
        shown = "required"
    elif dataclasses.is_dataclass(value):
        shown = ""
    elif value is None:
        shown = "`null`"
    else:
        listed = list(value) if isinstance(value, tuple) else value
        shown = f"`{str(listed).lower() if isinstance(value, bool) else listed}`"
    return f"{shown} ({limits})" if limits else shown


def _limit(limit: Any) -> str:
    for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if hasattr(limit, name):
            return f"{sign} {getattr(limit, name)}"
    return ""


def _attribute_docstrings(kind: Any) -> dict[str, str]:
    """Texts that stand below the fields of a class."""
    module = importlib.import_module(kind.__module__)
    tree = ast.parse(inspect.getsource(module))
    body = next(
        n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == kind.__name__
    )
    found: dict[str, str] = {}
    for before, node in itertools.pairwise(body):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
        ):
            found[before.target.id] = inspect.cleandoc(str(node.value.value))
    return found


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return (
            "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
        )

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)]) + "\n"


def main(arguments: list[str]) -> int:
    pages = {"cli.md": command_line(), "config.md": configuration(), "schema.md": schema()}
    stale = [
        n for n, text in pages.items() if not (OUT / n).exists() or (OUT / n).read_text() != text
    ]
    if "--check" in arguments:
        for name in stale:
            print(
                f"docs/reference/{name} is not up to date: run 'python tools/generate_reference.py'"
            )
        return 1 if stale else 0
    OUT.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (OUT / name).write_text(pages[name])
    print(f"written: {', '.join(stale) or 'nothing, all pages are up to date'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
