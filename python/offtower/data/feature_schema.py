"""A feature of a schema: its columns, and how it is encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

FeatureKind = Literal["numeric", "vector", "category", "bag", "text", "history"]

_STRICT = ConfigDict(extra="forbid")
_OF_HISTORIES = ("length", "times", "events", "dwell")
_OF_TEXTS = ("length", "tokens")
_HISTORY_LENGTH = 50
_TEXT_LENGTH = 512
_TEXT_BUCKETS = 2**16


@dataclass(config=_STRICT, frozen=True)
class FeatureSpec:
    """A feature: its column and encoding."""

    name: str
    kind: FeatureKind
    """numeric: a number; vector: a list of `dim` numbers; category: a string or integer;
    bag: a list of categories; text: words, hashed with their parts; history: ids of items of the
    catalogue, the oldest event first."""
    dim: int | None = Field(default=None, ge=1)
    """Length of a vector; by default that of the data."""
    encoding: Literal["vocabulary", "hash"] = "vocabulary"
    """Of categories and bags: a vocabulary of training values, or a stable hash into `buckets`.
    Texts are hashed."""
    buckets: int = Field(default=2**20, ge=1)
    """Rows of the table of a hashed feature; 65,536 for texts by default."""
    min_count: int = Field(default=1, ge=1)
    """Less frequent values are encoded as unknown."""
    embedding_dim: int | None = Field(default=None, ge=1)
    """Width of the embedding of a category or bag; the tower's default if None."""
    column: str | None = None
    """Column of the file; `name` if None."""
    length: int | None = Field(default=None, ge=1)
    """Events of a history that are read, the newest; 50 if None. Characters of a text that are
    read, the first; 512 if None."""
    times: str | None = None
    """Column with the times of a history's events, lists of the same lengths, in the unit of the
    log's timestamp. All lie before the row's timestamp; unordered events are sorted by them."""
    events: str | None = None
    """Column with the types of a history's events, such as click and purchase."""
    dwell: str | None = None
    """Column with a number for each event of a history, such as the seconds that it lasted."""

    tokens: Literal["subwords", "words"] | None = None
    """What a text is hashed as: its words and their character n-grams of 3 to 5, or its words in
    their order; subwords if None."""

    def __repr__(self) -> str:
        # Fingerprints of data hold this text, and those of data without histories and texts must
        # not change.
        hidden = {*_OF_HISTORIES, *_OF_TEXTS}
        hidden -= (
            {*_OF_HISTORIES} if self.history else {*_OF_TEXTS} if self.kind == "text" else {""}
        )
        named = [f.name for f in fields(self) if f.name not in hidden]
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
    def pooled(self) -> bool:
        """Whether a row has any number of values, whose embeddings are pooled."""
        return self.kind in ("bag", "text")

    @property
    def most_events(self) -> int:
        """Events of a history that are read."""
        return self.length or _HISTORY_LENGTH

    @property
    def most_characters(self) -> int:
        """Characters of a text that are read."""
        return self.length or _TEXT_LENGTH

    @property
    def hashed_tokens(self) -> str:
        """What a text is hashed as."""
        return self.tokens or "subwords"

    @property
    def parts(self) -> tuple[FeatureSpec, ...]:
        """Features of the events of a history, each encoded like one of its kind."""
        found = []
        if self.events is not None:
            found.append(FeatureSpec(name=f"{self.name}/events", kind="category"))
        if self.dwell is not None:
            found.append(FeatureSpec(name=f"{self.name}/dwell", kind="numeric"))
        return tuple(found)

    @model_validator(mode="before")
    @classmethod
    def _of_texts(cls, given: Any) -> Any:
        """Texts are hashed, into fewer buckets than categories, unless they say otherwise."""
        defaults = {"encoding": "hash", "buckets": _TEXT_BUCKETS}
        if isinstance(given, ArgsKwargs):
            names = [f.name for f in fields(cls)][: len(given.args)]
            named = {**dict(zip(names, given.args, strict=True)), **(given.kwargs or {})}
            return {**defaults, **named} if named.get("kind") == "text" else given
        if isinstance(given, Mapping) and given.get("kind") == "text":
            return {**defaults, **given}
        return given

    @model_validator(mode="after")
    def _check(self) -> FeatureSpec:
        if self.dim is not None and self.kind != "vector":
            raise ValueError(f"feature '{self.name}': 'dim' is for vectors, not for {self.kind}")
        for name in _OF_HISTORIES:
            if getattr(self, name) is not None and not (
                self.history or (self.kind == "text" and name in _OF_TEXTS)
            ):
                raise ValueError(
                    f"feature '{self.name}': '{name}' is for histories, not for {self.kind}"
                )
        if self.tokens is not None and self.kind != "text":
            raise ValueError(f"feature '{self.name}': 'tokens' is for texts, not for {self.kind}")
        if self.kind == "text" and (self.encoding, self.min_count) != ("hash", 1):
            raise ValueError(
                f"feature '{self.name}': the words of a text are hashed; leave 'encoding' and "
                "'min_count' out"
            )
        if self.history and (self.encoding, self.min_count) != ("vocabulary", 1):
            raise ValueError(
                f"feature '{self.name}': the values of a history are the items of the catalogue; "
                "leave 'encoding' and 'min_count' out"
            )
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"feature '{self.name}' names one column twice: {self.sources}")
        return self
