"""The section `eligible` of a log schema: which items could have been shown for a row."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", populate_by_name=True)


@dataclass(config=_STRICT, frozen=True)
class AttributeForm:
    """An item is eligible where its column `item` is or contains the row's value of `context`."""

    item: str
    """Column of the catalogue: a category, or a bag of categories."""
    context: str
    """Column of the log: a category."""


@dataclass(config=_STRICT, frozen=True)
class IntervalForm:
    """An item is eligible where [from, until) contains the row's timestamp."""

    start: str | None = Field(default=None, alias="from")
    """Column of the catalogue with the first time; where null, the item is eligible from the
    beginning."""
    until: str | None = None
    """Column of the catalogue with the first time at which the item is no longer eligible; where
    null, it stays eligible."""

    @model_validator(mode="after")
    def _check(self) -> IntervalForm:
        if self.start is None and self.until is None:
            raise ValueError("name 'from', 'until' or both")
        return self


@dataclass(config=_STRICT, frozen=True)
class ListForm:
    """A list of item ids in each row."""

    column: str
    """Column of the log: a list of item ids."""


@dataclass(config=_STRICT, frozen=True)
class EligibleSchema:
    """Which items could have been shown for a row: those that satisfy all forms that are given."""

    attribute: tuple[AttributeForm, ...] = ()
    """Items whose column contains the row's value; one section or a list of them."""
    interval: IntervalForm | None = None
    """Items available at the row's timestamp."""
    exclude: ListForm | None = None
    """Items that may not be shown, such as those seen before. Ids that the catalogue does not have
    are dropped and counted."""
    candidates: ListForm | None = None
    """The only items that may be shown. A row with an id that the catalogue does not have is
    refused."""

    @field_validator("attribute", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (dict, AttributeForm)) else value

    @model_validator(mode="after")
    def _check(self) -> EligibleSchema:
        if not (self.attribute or self.interval or self.exclude or self.candidates):
            raise ValueError("give at least one of attribute, interval, exclude and candidates")
        for name in {form.item for form in self.attribute}:
            if sum(form.item == name for form in self.attribute) > 1:
                raise ValueError(f"the item column '{name}' is named by two attributes")
        if self.exclude and self.candidates and self.exclude.column == self.candidates.column:
            raise ValueError(
                f"column '{self.exclude.column}' cannot hold both excluded items and candidates"
            )
        return self

    @property
    def lists(self) -> tuple[str, ...]:
        """Columns of the log with lists of item ids."""
        return tuple(form.column for form in (self.exclude, self.candidates) if form is not None)

    @property
    def log_columns(self) -> tuple[str, ...]:
        """Columns of the log that the forms read, without the timestamp."""
        return (*(form.context for form in self.attribute), *self.lists)

    @property
    def item_columns(self) -> tuple[str, ...]:
        """Columns of the catalogue that the forms read."""
        names = [form.item for form in self.attribute]
        if self.interval is not None:
            names += [n for n in (self.interval.start, self.interval.until) if n is not None]
        return tuple(dict.fromkeys(names))
