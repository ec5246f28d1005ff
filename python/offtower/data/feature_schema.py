"""A feature of a schema: its columns, and how it is encoded."""

from __future__ import annotations

from dataclasses import fields
from typing import Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

FeatureKind = Literal["numeric", "vector", "category", "bag", "history"]

_STRICT = ConfigDict(extra="forbid")
_OF_HISTORIES = ("length", "times", "events", "dwell")
_HISTORY_LENGTH = 50


@dataclass(config=_STRICT, frozen=True)
class FeatureSpec:
    """A feature: its column and encoding."""

    name: str
    kind: FeatureKind
    """numeric: a number; vector: a list of `dim` numbers; category: a string or integer;
    bag: a list of categories; history: ids of items of the catalogue, the oldest event first."""
    dim: int | None = Field(default=None, ge=1)
    """Length of a vector; by default that of the data."""
    encoding: Literal["vocabulary", "hash"] = "vocabulary"
    """Of categories and bags: a vocabulary of training values, or a stable hash into `buckets`."""
    buckets: int = Field(default=2**20, ge=1)
    min_count: int = Field(default=1, ge=1)
    """Less frequent values are encoded as unknown."""
    embedding_dim: int | None = Field(default=None, ge=1)
    """Width of the embedding of a category or bag; the tower's default if None."""
    column: str | None = None
    """Column of the file; `name` if None."""
    length: int | None = Field(default=None, ge=1)
    """Events of a history that are read, the newest; 50 if None."""
    times: str | None = None
    """Column with the times of a history's events, lists of the same lengths, in the unit of the
    log's timestamp. All lie before the row's timestamp; unordered events are sorted by them."""
    events: str | None = None
    """Column with the types of a history's events, such as click and purchase."""
    dwell: str | None = None
    """Column with a number for each event of a history, such as the seconds that it lasted."""

    def __repr__(self) -> str:
        # Fingerprints of data hold this text, and those of data without histories must not change.
        named = [f.name for f in fields(self) if f.name not in _OF_HISTORIES or self.history]
        return f"FeatureSpec({', '.join(f'{name}={getattr(self, name)!r}' for name in named)})"

    @property
    def source(self) -> str:
        """The column that holds the feature."""
        return self.column or self.name

    @property
    def sources(self) -> tuple[str, ...]:
        """All columns that the feature is read from."""
        others = (self.times, self.events, self.dwell)
        return (self.source, *(name for name in others if name is not None))

    @property
    def history(self) -> bool:
        """Whether it lists items of the catalogue."""
        return self.kind == "history"

    @property
    def most_events(self) -> int:
        """Events of a history that are read."""
        return self.length or _HISTORY_LENGTH

    @property
    def parts(self) -> tuple[FeatureSpec, ...]:
        """Features of the events of a history, each encoded like one of its kind."""
        found = []
        if self.events is not None:
            found.append(FeatureSpec(name=f"{self.name}/events", kind="category"))
        if self.dwell is not None:
            found.append(FeatureSpec(name=f"{self.name}/dwell", kind="numeric"))
        return tuple(found)

    @model_validator(mode="after")
    def _check(self) -> FeatureSpec:
        if self.dim is not None and self.kind != "vector":
            raise ValueError(f"feature '{self.name}': 'dim' is for vectors, not for {self.kind}")
        for name in _OF_HISTORIES:
            if getattr(self, name) is not None and not self.history:
                raise ValueError(
                    f"feature '{self.name}': '{name}' is for histories, not for {self.kind}"
                )
        if self.history and (self.encoding, self.min_count) != ("vocabulary", 1):
            raise ValueError(
                f"feature '{self.name}': the values of a history are the items of the catalogue; "
                "leave 'encoding' and 'min_count' out"
            )
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"feature '{self.name}' names one column twice: {self.sources}")
        return self
