"""How outcomes are joined to decisions, and what a join found."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from offtower.errors import ConfigError

Rule = Literal["sum", "max", "first", "any"]
Duplicates = Literal["error", "drop", "keep"]
_RULES = ("sum", "max", "first", "any")


@dataclass(frozen=True)
class JoinedReward:
    """A reward to make from outcomes.

    Attributes:
        name: of the new column of the decisions.
        column: of the outcomes; `name` if None.
        rule: how several outcomes of a decision become one reward: their sum or maximum, the first
            (by time, then in the order of the file), or 1 where any is not 0. None refuses several.
    """

    name: str
    column: str | None = None
    rule: Rule | None = None

    def __post_init__(self) -> None:
        if self.rule is not None and self.rule not in _RULES:
            raise ConfigError(f"the rule of '{self.name}' is '{self.rule}', known: {_RULES}")

    @property
    def source(self) -> str:
        """The column of the outcomes."""
        return self.column or self.name


@dataclass(frozen=True)
class JoinPlan:
    """How outcomes belong to decisions.

    Attributes:
        keys: pairs of the decisions' and the outcomes' column, which together name a decision.
        rewards: columns to add.
        decided, came: time columns of decisions and outcomes; needed for a window.
        window: only outcomes within this time of the decision count: "7d", or a number in the
            columns' unit where they hold numbers.
        duplicates: what to do with outcomes that equal an earlier one in every column, where a sum
            would count them twice.
    """

    keys: tuple[tuple[str, str], ...]
    rewards: tuple[JoinedReward, ...]
    decided: str | None = None
    came: str | None = None
    window: str | float | None = None
    duplicates: Duplicates = "error"

    def __post_init__(self) -> None:
        if not self.keys or not self.rewards:
            raise ConfigError("a join needs at least one key column and one reward")
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ConfigError(f"a reward is named twice: {', '.join(names)}")
        if self.window is not None and None in (self.decided, self.came):
            raise ConfigError("a window needs the time columns of decisions and of outcomes")


@dataclass(frozen=True)
class JoinCounts:
    """What a join found.

    Attributes:
        decisions, outcomes: rows of both sides.
        rewarded: decisions with an outcome; the others have a null reward.
        several: decisions with more than one outcome.
        unmatched: outcomes of no decision.
        early, late: outcomes before their decision, or after the window; ignored.
        duplicates: outcomes that equal an earlier one in every column.
        newest: the latest time of an outcome, as its column has it; None without times.
    """

    decisions: int = 0
    outcomes: int = 0
    rewarded: int = 0
    several: int = 0
    unmatched: int = 0
    early: int = 0
    late: int = 0
    duplicates: int = 0
    newest: int | None = None

    def __add__(self, other: JoinCounts) -> JoinCounts:
        sums = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name != "newest"
        }
        times = [one.newest for one in (self, other) if one.newest is not None]
        return JoinCounts(**sums, newest=max(times, default=None))

    def to_dict(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "newest"}
