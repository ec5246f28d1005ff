"""Schemas of logs and catalogues: their columns and features.

Folders that offtower writes have their schema in `_offtower.json`, so a config may omit it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import datetime
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from offtower.data.durations import parse_duration
from offtower.data.eligible_schema import (
    AttributeForm,
    EligibleSchema,
    IntervalForm,
    ListForm,
)
from offtower.data.feature_schema import FeatureKind, FeatureSpec
from offtower.errors import ConfigError

__all__ = [
    "CatalogueSchema",
    "FeatureKind",
    "FeatureSpec",
    "LogSchema",
    "NamedReward",
    "Outcomes",
    "PscoreKind",
    "parse_section",
    "spec_from_dict",
    "spec_to_dict",
]

PscoreKind = Literal["marginal", "conditional", "slate"]

_STRICT = ConfigDict(extra="forbid")


@dataclass(config=_STRICT, frozen=True)
class Outcomes:
    """When a missing reward is final. A null reward is pending, never 0."""

    maturity: str | float
    """Time after the decision in which its outcome can come: 7d, 12h, 30min; a number, in the
    column's unit, where the timestamp is a number. Younger rows are left out, rewarded or not."""
    missing: Literal["error"] | float = "error"
    """Reward of older rows without an outcome: a number such as 0, or refuse them."""
    time: str | None = None
    """Column with the time of the outcome; outcomes after the maturity are ignored."""
    as_of: datetime | float | None = None
    """When the outcomes were collected (UTC if it names no zone); the newest timestamp if None."""

    @model_validator(mode="after")
    def _check(self) -> Outcomes:
        if isinstance(self.maturity, str):
            parse_duration(self.maturity, "maturity")
        elif not 0.0 <= self.maturity < float("inf"):
            raise ValueError(f"maturity must not be negative, but is {self.maturity:g}")
        if isinstance(self.missing, float) and not abs(self.missing) < float("inf"):
            raise ValueError(f"missing must be error or a finite number, but is {self.missing}")
        return self


@dataclass(config=_STRICT, frozen=True)
class NamedReward:
    """One of several rewards of a row, such as click, purchase and revenue."""

    name: str
    weight: float = 1.0
    """Factor in the row's reward, the weighted sum of all."""
    column: str | None = None
    """Column of the file; `name` if None."""

    @property
    def source(self) -> str:
        """The column that holds the reward."""
        return self.column or self.name

    @model_validator(mode="after")
    def _check(self) -> NamedReward:
        if not abs(self.weight) < float("inf"):
            raise ValueError(f"reward '{self.name}': weight must be finite, got {self.weight}")
        return self


@dataclass(config=_STRICT, frozen=True)
class LogSchema:
    """Columns of a log."""

    context: tuple[FeatureSpec, ...] = ()
    action: str = "action"
    reward: str = "reward"
    pscore: str | None = "pscore"
    """Column with pi_0(a|x) in (0, 1]; None without propensities."""
    timestamp: str | None = None
    behavior_policy: str | None = None
    position: str | None = None
    """Column with the position of the item in its round, from 0."""
    pscore_kind: PscoreKind | None = None
    """What pscore is where the log has positions: marginal, pi_0(a|x) of the item at its position;
    conditional, pi_0(a_k|x, a_1..a_{k-1}) given the items above; slate, the probability of the
    whole slate, the same in each of its rows."""
    round_id: str | None = None
    user_id: str | None = None
    rewards: tuple[NamedReward, ...] = ()
    """Several rewards with weights; `reward` is then the column that ingest makes of their weighted
    sum, and an evaluation reports each of them beside it."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest possible reward (of the weighted sum); rows outside are refused."""
    weight: str | None = None
    """Column with the known weight of each row, for a log that was down-sampled; None where every
    row counts once."""
    weight_kind: Literal["sampling_rate", "weight"] = "sampling_rate"
    """What `weight` holds: the share of such rows that the log kept, in (0, 1], so that a row
    counts as 1 / it; or the weight itself."""
    eligible: EligibleSchema | None = None
    """Which items could have been shown for a row; None where every item could."""
    keep: tuple[str, ...] = ()
    """Further columns of numbers that ingest keeps, such as the probability of the logged item
    under another policy (`offtower evaluate --policy-column`)."""
    outcomes: Outcomes | None = None
    """For logs with pending rewards, at ingest; without it a null reward is a bad row."""

    @model_validator(mode="after")
    def _check(self) -> LogSchema:
        if self.eligible is not None:
            if self.eligible.interval is not None and self.timestamp is None:
                raise ValueError("eligible.interval needs the rows' times: name 'timestamp'")
            if self.action in self.eligible.log_columns:
                raise ValueError(f"eligible reads '{self.action}', which is the action's column")
        low, high = self.reward_range
        if not (low < high and abs(low) < 1e38 and abs(high) < 1e38):
            raise ValueError(
                f"reward_range must be two finite numbers, low < high, got {low, high}"
            )
        timed = next((spec.name for spec in self.context if spec.times is not None), None)
        if timed is not None and self.timestamp is None:
            raise ValueError(
                f"feature '{timed}' has times, which must lie before the rows' times: name "
                "'timestamp'"
            )
        self._check_slates()
        if self.weight is not None and self.slates:
            raise ValueError("weight: rows of slates cannot have weights")
        _unique_names(self.context)
        _unique_names(self.rewards)
        if self.reward in {one.source for one in self.rewards}:
            raise ValueError(
                f"'{self.reward}' is the column of the weighted sum of `rewards`, and of one of "
                "them: name the sum's column in `reward`, such as reward: value"
            )
        if self.outcomes is not None and self.timestamp is None:
            raise ValueError("outcomes need a timestamp: name the column with the decision's time")
        return self

    def _check_slates(self) -> None:
        kind = self.pscore_kind
        if self.position is None and kind is not None and kind != "marginal":
            raise ValueError(f"pscore_kind '{kind}' needs the columns position and round_id")
        if self.position is None or self.pscore is None:
            return
        if kind is None:
            raise ValueError(
                "a log with positions must state what its pscore is. Set pscore_kind to "
                "'marginal' (probability of the item at its position, whatever the other "
                "positions show), 'conditional' (given the items above it in the round, as "
                "`offtower search --sample` writes), or 'slate' (of the whole slate, the same in "
                "each of its rows)"
            )
        if kind != "marginal" and self.round_id is None:
            raise ValueError(f"pscore_kind '{kind}' needs the column round_id")

    @property
    def slates(self) -> bool:
        """Whether rows form slates: rounds that are kept, weighted and evaluated as a whole.

        Rows with marginal pscores stand for themselves.
        """
        return self.pscore_kind in ("conditional", "slate")

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of the schema, without repetition."""
        named = [name for spec in self.context for name in spec.sources]
        named += [
            name
            for name in (
                self.action,
                self.reward,
                *(one.source for one in self.rewards),
                self.pscore,
                self.timestamp,
                self.behavior_policy,
                self.position,
                self.round_id,
                self.user_id,
                self.weight,
                None if self.outcomes is None else self.outcomes.time,
            )
            if name is not None
        ]
        named += () if self.eligible is None else self.eligible.log_columns
        named += self.keep
        return tuple(dict.fromkeys(named))

    @property
    def reward_columns(self) -> tuple[str, ...]:
        """Columns of the source that hold outcomes."""
        return tuple(dict.fromkeys(one.source for one in self.rewards)) or (self.reward,)

    @property
    def source_columns(self) -> tuple[str, ...]:
        """Columns of the source: all but the sum of several rewards, which ingest makes."""
        made = {self.reward} if self.rewards else set()
        return tuple(name for name in self.columns if name not in made)

    def to_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = _LOG.dump_python(self, mode="json", by_alias=True)
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LogSchema:
        return parse_section(_LOG, content, "log schema", cls)


@dataclass(config=_STRICT, frozen=True)
class CatalogueSchema:
    """Columns of a catalogue."""

    item_id: str = "item_id"
    features: tuple[FeatureSpec, ...] = ()
    eligible: tuple[str, ...] = ()
    """Columns that are kept for the log schema's section `eligible`; ingest names them."""

    @model_validator(mode="after")
    def _check(self) -> CatalogueSchema:
        _unique_names(self.features)
        for spec in self.features:
            if spec.history:
                raise ValueError(
                    f"feature '{spec.name}': histories are features of contexts; an item may list "
                    "other items as a bag"
                )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        features = [spec.source for spec in self.features]
        return tuple(dict.fromkeys([self.item_id, *features, *self.eligible]))

    def keeping(self, section: EligibleSchema | None) -> CatalogueSchema:
        """Return the schema with the columns that a log schema's section `eligible` reads."""
        if section is None or set(section.item_columns) <= set(self.eligible):
            return self
        names = dict.fromkeys([*self.eligible, *section.item_columns])
        return replace(self, eligible=tuple(names))

    def to_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = _CATALOGUE.dump_python(self, mode="json")
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CatalogueSchema:
        return parse_section(_CATALOGUE, content, "catalogue schema", cls)


_LOG: TypeAdapter[LogSchema] = TypeAdapter(LogSchema)
_CATALOGUE: TypeAdapter[CatalogueSchema] = TypeAdapter(CatalogueSchema)
_SPEC: TypeAdapter[FeatureSpec] = TypeAdapter(FeatureSpec)


def spec_to_dict(spec: FeatureSpec) -> dict[str, Any]:
    content: dict[str, Any] = _SPEC.dump_python(spec, mode="json")
    return content


def spec_from_dict(content: Mapping[str, Any]) -> FeatureSpec:
    return parse_section(_SPEC, content, "feature", FeatureSpec)


Parsed = TypeVar("Parsed")


def parse_section(
    adapter: TypeAdapter[Parsed], content: Mapping[str, Any], what: str, kind: type
) -> Parsed:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{what} must be keys and values, got {type(content).__name__}")
    try:
        return adapter.validate_python(dict(content))
    except ValidationError as error:
        raise ConfigError(
            f"{what}: " + "; ".join(_explain(item, kind) for item in error.errors())
        ) from None


def _explain(item: Any, kind: type) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(item["loc"][:-1], kind)
        nearest = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(known)}"
        return f"unknown key '{where}'; {hint}"
    if item["type"] in ("missing", "missing_argument"):
        return f"'{where}' is required"
    message = item["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    return f"'{where}': {message}" if where else message


def _known_keys(path: tuple[Any, ...], kind: type) -> list[str]:
    """Keys of the section at a path inside a schema."""
    if not path:
        return [f.name for f in fields(kind)]
    if path[0] != "eligible":
        return [f.name for f in fields(FeatureSpec)]
    inside: dict[str, list[str]] = {
        "attribute": [f.name for f in fields(AttributeForm)],
        "interval": ["from", *(f.name for f in fields(IntervalForm) if f.name != "start")],
        "exclude": [f.name for f in fields(ListForm)],
        "candidates": [f.name for f in fields(ListForm)],
    }
    return inside[path[1]] if len(path) > 1 else [f.name for f in fields(EligibleSchema)]


def _unique_names(specs: tuple[FeatureSpec, ...] | tuple[NamedReward, ...]) -> None:
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        what = "feature" if isinstance(specs[0], FeatureSpec) else "reward"
        raise ValueError(f"{what} '{twice[0]}' is named twice")
