"""Kinds of columns, as schemas name them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from offtower.data.eligible_schema import EligibleSchema
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.errors import ConfigError

ColumnKind = Literal["text", "number", "integer", "time", "vector", "bag", "labels", "times", "any"]
"""text: ids and categories, as they stand; integer: whole numbers; time: timestamps or numbers;
vector: lists of numbers; bag: lists of categories; labels: text, or a bag where the file has lists;
times: lists of times or numbers; any: as it stands."""

LIST_KINDS: tuple[ColumnKind, ...] = ("vector", "bag", "times")

FEATURE_KINDS: dict[str, ColumnKind] = {
    "numeric": "number",
    "category": "text",
    "vector": "vector",
    "bag": "bag",
    "text": "text",
    "history": "bag",
}
_BOTH: dict[frozenset[str], ColumnKind] = {
    frozenset({"number", "integer"}): "integer",
    frozenset({"number", "text"}): "integer",
    frozenset({"integer", "text"}): "integer",
    frozenset({"number", "time"}): "number",
    frozenset({"integer", "time"}): "integer",
    frozenset({"text", "time"}): "integer",
    frozenset({"labels", "text"}): "text",
    frozenset({"labels", "bag"}): "bag",
}
"""Kind of a column that a schema names twice: one that serves both uses."""


def log_kinds(schema: LogSchema) -> dict[str, ColumnKind]:
    """Kinds of the columns of a log, in the order of `LogSchema.source_columns`.

    Raises:
        ConfigError: a column is named as two kinds that exclude each other.
    """
    named = _features(schema.context)
    named.append((schema.action, "text"))
    named += [(name, "number") for name in schema.reward_columns]
    optional: list[tuple[str | None, ColumnKind]] = [
        (schema.pscore, "number"),
        (schema.timestamp, "time"),
        (schema.behavior_policy, "text"),
        (schema.position, "integer"),
        (schema.round_id, "text"),
        (schema.user_id, "text"),
        (schema.weight, "number"),
    ]
    named += [(name, kind) for name, kind in optional if name is not None]
    if schema.outcomes is not None and schema.outcomes.time is not None:
        named.append((schema.outcomes.time, "time"))
    if schema.eligible is not None:
        named += [(form.context, "text") for form in schema.eligible.attribute]
        named += [(name, "bag") for name in schema.eligible.lists]
    named += [(name, "number") for name in schema.keep]
    kinds = joined_kinds(named)
    return {name: kinds[name] for name in schema.source_columns}


def catalogue_kinds(
    schema: CatalogueSchema, eligible: EligibleSchema | None = None
) -> dict[str, ColumnKind]:
    """Kinds of the columns of a catalogue.

    Args:
        eligible: the section of the log schema, which may read columns of its own.

    Raises:
        ConfigError: see `log_kinds`.
    """
    named: list[tuple[str, ColumnKind]] = [(schema.item_id, "text")]
    named += _features(schema.features)
    if eligible is not None:
        named += [(form.item, "labels") for form in eligible.attribute]
        interval = eligible.interval
        if interval is not None:
            named += [(n, "time") for n in (interval.start, interval.until) if n is not None]
    return joined_kinds(named)


def feature_kinds(specs: Iterable[FeatureSpec]) -> dict[str, ColumnKind]:
    """Kinds of the columns of features, such as those of contexts.

    Raises:
        ConfigError: see `log_kinds`.
    """
    return joined_kinds(_features(specs))


def joined_kinds(named: Iterable[tuple[str, ColumnKind]]) -> dict[str, ColumnKind]:
    """Kinds by column, of (column, kind) pairs in which a column may stand twice.

    Raises:
        ConfigError: a column is named as two kinds that exclude each other.
    """
    kinds: dict[str, ColumnKind] = {}
    for name, kind in named:
        before = kinds.setdefault(name, kind)
        if before == kind:
            continue
        both = _BOTH.get(frozenset({before, kind}))
        if both is None:
            raise ConfigError(
                f"the schema names column '{name}' both as {before} and as {kind}; "
                "write it as two columns"
            )
        kinds[name] = both
    return kinds


def _features(specs: Iterable[FeatureSpec]) -> list[tuple[str, ColumnKind]]:
    named: list[tuple[str | None, ColumnKind]] = []
    for spec in specs:
        named.append((spec.source, FEATURE_KINDS[spec.kind]))
        named += [(spec.times, "times"), (spec.events, "bag"), (spec.dwell, "vector")]
    return [(name, kind) for name, kind in named if name is not None]
