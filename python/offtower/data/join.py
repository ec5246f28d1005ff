"""Joins of decisions with their outcomes, in bounded memory.

Both sides are cut into partitions by a hash of the key and written to temporary files; a partition
is joined in memory (a Grace hash join). Decisions are then read a second time, in their order, and
take their rewards from a file of one number a row. Keys are compared by 128 bits of hash, whose
chance of a collision among 1e9 keys is 1e-21.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import (
    as_array,
    as_float_array,
    distinct_values,
    hash_values,
    is_category,
    is_number,
    is_text,
    splitmix64,
)
from offtower.data.outcomes import NULL_TIME, check_same_clock, comparable_times, duration_in
from offtower.errors import ConfigError, DataError

Rule = Literal["sum", "max", "first", "any"]
Duplicates = Literal["error", "drop", "keep"]
Tables = Callable[[], Iterable[pa.Table]]
"""Reads the rows from their start."""

_RULES = ("sum", "max", "first", "any")
_PARTITIONS = 256
_EXAMPLES = 3
_SEEDS = (np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344))
"""First digits of pi: the two hashes of a key start differently."""

_DECISION = np.dtype([("key", "u8", 2), ("row", "i8"), ("time", "i8")])


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


@dataclass
class Joined:
    """Decisions with their rewards; `tables` reads them once, `counts` is complete before that."""

    tables: Iterator[pa.Table]
    counts: JoinCounts


def join_tables(decisions: pa.Table, outcomes: pa.Table, plan: JoinPlan) -> pa.Table:
    """Join two tables in memory; see `join_outcomes`."""
    with tempfile.TemporaryDirectory(prefix="offtower-join-") as folder:
        joined = join_outcomes(lambda: [decisions], lambda: [outcomes], plan, Path(folder))
        return pa.concat_tables(joined.tables)


def join_outcomes(decisions: Tables, outcomes: Tables, plan: JoinPlan, folder: Path) -> Joined:
    """Give each decision its rewards; a decision without an outcome has null, which is pending.

    Args:
        decisions: read twice, in the same order.
        outcomes: read once.
        folder: for temporary files, about 32 bytes a decision and 48 an outcome.

    Raises:
        DataError: a column is missing or of a wrong type, a key names two decisions, a decision has
            a null key, outcomes are duplicates or several without a rule, or no outcome matches.
    """
    left = _Spill(folder / "decisions", _DECISION)
    right = _Spill(folder / "outcomes", _outcome_type(len(plan.rewards)))
    types: dict[str, pa.DataType] = {}
    rows = 0
    for table in decisions():
        _spill_decisions(table, plan, left, types, rows)
        rows += table.num_rows
    if rows == 0:
        raise DataError("the decisions have no rows")
    total = JoinCounts(decisions=rows)
    for table in outcomes():
        total += _spill_outcomes(table, plan, right, types, total.outcomes)
    left.close()
    right.close()
    rewards = np.memmap(
        folder / "rewards", dtype=np.float64, mode="w+", shape=(len(plan.rewards), rows)
    )
    # A null reward is a NaN in the file.
    for column in rewards:
        column[:] = np.nan
    for partition in range(_PARTITIONS):
        total += _join_partition(left.read(partition), right.read(partition), plan, rewards)
    if total.outcomes and total.unmatched == total.outcomes:
        pairs = ", ".join(f"{one} = {other}" for one, other in plan.keys)
        raise DataError(
            f"none of the {total.outcomes:,} outcomes belongs to a decision ({pairs}): compare "
            "the key columns of both files"
        )
    return Joined(_with_rewards(decisions, plan, rewards), total)


def _spill_decisions(
    table: pa.Table, plan: JoinPlan, spill: _Spill, types: dict[str, pa.DataType], first: int
) -> None:
    mine = [one for one, _ in plan.keys]
    _need(table, [*mine, *([] if plan.decided is None else [plan.decided])], "the decisions")
    taken = [reward.name for reward in plan.rewards if reward.name in table.column_names]
    if taken:
        raise DataError(
            f"the decisions have a column '{taken[0]}' already: rewards of an earlier join or of "
            "another log. Join to the decisions as they were served"
        )
    for name in mine:
        column = table.column(name)
        if not is_category(column.type):
            raise DataError(f"key column '{name}' is {column.type}, expected text or integers")
        types.setdefault(name, column.type)
        if column.null_count:
            row = int(np.flatnonzero(as_array(column).is_null().to_numpy(False))[0])
            raise DataError(f"decision {first + row} has no key: column '{name}' is null")
    found = np.empty(table.num_rows, dtype=_DECISION)
    found["key"] = _keys([table.column(name) for name in mine])
    found["row"] = np.arange(first, first + table.num_rows)
    found["time"] = NULL_TIME
    if plan.decided is not None and plan.came is not None:
        times = table.column(plan.decided)
        types.setdefault(plan.decided, times.type)
        found["time"] = comparable_times(times)
    spill.add(found)


def _spill_outcomes(
    table: pa.Table, plan: JoinPlan, spill: _Spill, types: dict[str, pa.DataType], first: int
) -> JoinCounts:
    names = [other for _, other in plan.keys]
    _need(table, [*names, *([] if plan.came is None else [plan.came])], "the outcomes")
    columns = [table.column(name) for name in names]
    for (mine, other), column in zip(plan.keys, columns, strict=True):
        wanted = types[mine]
        if not is_category(column.type) or is_text(column.type) != is_text(wanted):
            raise DataError(
                f"key column '{mine}' of the decisions is {wanted}, '{other}' of the outcomes is "
                f"{column.type}: write both as text, or both as integers"
            )
    found = np.empty(table.num_rows, dtype=spill.kind)
    found["key"] = _keys(columns)
    found["order"] = np.arange(first, first + table.num_rows)
    found["time"] = found["limit"] = NULL_TIME
    newest = None
    if plan.came is not None:
        came = table.column(plan.came)
        if plan.decided is not None:
            check_same_clock(types[plan.decided], came.type, plan.decided, plan.came)
        found["time"] = comparable_times(came)
        newest = int(found["time"].max(initial=NULL_TIME))
        newest = None if newest == NULL_TIME else newest
        if plan.window is not None:
            found["limit"] = duration_in(came, plan.window, plan.came)
    found["whole"] = _keys([table.column(name) for name in _hashable(table)])[:, 0]
    for index, reward in enumerate(plan.rewards):
        found["value"][:, index] = _values(table, reward)
    known = np.ones(table.num_rows, dtype=bool)
    for column in columns:
        known &= as_array(column).is_valid().to_numpy(False)
    spill.add(found[known])
    return JoinCounts(outcomes=table.num_rows, unmatched=int((~known).sum()), newest=newest)


def _values(table: pa.Table, reward: JoinedReward) -> NDArray[np.float64]:
    if reward.source not in table.column_names:
        if reward.rule == "any" and reward.column is None:
            return np.ones(table.num_rows)  # A row is an event.
        raise DataError(
            f"the outcomes have no column '{reward.source}'; they have "
            f"{', '.join(table.column_names)}"
        )
    column = table.column(reward.source)
    if not is_number(column.type) and not pa.types.is_boolean(column.type):
        raise DataError(f"column '{reward.source}' of the outcomes is {column.type}, not a number")
    values = as_float_array(column)
    wrong = np.isinf(values)
    if wrong.any():
        raise DataError(f"outcome {int(wrong.argmax())}: column '{reward.source}' is infinite")
    return values


def _join_partition(
    decisions: NDArray[Any], outcomes: NDArray[Any], plan: JoinPlan, rewards: NDArray[np.float64]
) -> JoinCounts:
    """Fill the rewards of one partition's decisions."""
    order = np.lexsort((decisions["key"][:, 1], decisions["key"][:, 0]))
    decisions = decisions[order]
    same = (decisions["key"][1:] == decisions["key"][:-1]).all(axis=1)
    if same.any():
        at = int(same.argmax())
        one, other = sorted((decisions["row"][at], decisions["row"][at + 1]))
        names = ", ".join(name for name, _ in plan.keys)
        raise DataError(
            f"decisions {one} and {other} have the same key ({names}), and {int(same.sum()):,} "
            "rows of this kind were found in a part of them: an outcome would belong to both. "
            "Name key columns that are unique to a decision, or remove the repeated rows"
        )
    outcomes = outcomes[np.argsort(outcomes["order"], kind="stable")]
    match = _find(decisions["key"], outcomes["key"])
    unmatched = int((match < 0).sum())
    outcomes, match = outcomes[match >= 0], match[match >= 0]
    early = late = np.zeros(len(outcomes), dtype=bool)
    if plan.came is not None and plan.decided is not None:
        decided, came = decisions["time"][match], outcomes["time"]
        timed = (decided != NULL_TIME) & (came != NULL_TIME)
        early = timed & (came < decided)
        if plan.window is not None:
            late = timed & ~early & (came - decided > outcomes["limit"])
            if not timed.all():
                raise DataError(
                    f"{int((~timed).sum()):,} outcomes or their decisions have no time, which a "
                    "window needs"
                )
    kept = ~(early | late)
    outcomes, match = outcomes[kept], match[kept]
    order = np.lexsort((outcomes["order"], outcomes["time"], match))
    outcomes, match = outcomes[order], match[order]
    repeated = _repeats(match, outcomes["whole"])
    _check_duplicates(repeated, outcomes, plan)
    duplicates = int(repeated.sum())
    if plan.duplicates == "drop":
        outcomes, match = outcomes[~repeated], match[~repeated]
    each = np.bincount(match, minlength=len(decisions))
    for index, reward in enumerate(plan.rewards):
        group, value = _combined(match, outcomes["value"][:, index], reward, decisions, plan)
        rewards[index, decisions["row"][group]] = value
    return JoinCounts(
        rewarded=int((each > 0).sum()),
        several=int((each > 1).sum()),
        unmatched=unmatched,
        early=int(early.sum()),
        late=int(late.sum()),
        duplicates=duplicates,
    )


def _combined(
    match: NDArray[np.int64],
    value: NDArray[np.float64],
    reward: JoinedReward,
    decisions: NDArray[Any],
    plan: JoinPlan,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return decisions (by index) with a value, and their values by the rule."""
    known = ~np.isnan(value)
    match, value = match[known], value[known]
    first = np.flatnonzero(np.diff(match, prepend=-1))
    group = match[first]
    if reward.rule is None and len(first) < len(match):
        several = np.flatnonzero(np.diff(np.append(first, len(match))) > 1)
        example = decisions["row"][group[several[:_EXAMPLES]]].tolist()
        raise DataError(
            f"decisions have several outcomes with a '{reward.name}' (for example decision "
            f"{', '.join(map(str, example))}, counted from 0): state how they become one reward "
            "with --rule sum, max, first or any"
        )
    if not len(first):
        return group, value
    if reward.rule == "sum":
        return group, np.add.reduceat(value, first)
    if reward.rule == "max":
        return group, np.maximum.reduceat(value, first)
    if reward.rule == "any":
        return group, np.logical_or.reduceat(value != 0.0, first).astype(np.float64)
    return group, value[first]


def _check_duplicates(repeated: NDArray[np.bool_], outcomes: NDArray[Any], plan: JoinPlan) -> None:
    if plan.duplicates != "error" or not repeated.any():
        return
    if all(reward.rule in ("max", "first", "any") for reward in plan.rewards):
        return  # A repeated outcome changes nothing.
    rows = outcomes["order"][repeated][:_EXAMPLES].tolist()
    raise DataError(
        f"outcomes equal an earlier one in every column (for example outcome "
        f"{', '.join(map(str, rows))}, counted from 0): replayed events would count twice. Drop "
        "them with --duplicates drop, or count them with --duplicates keep"
    )


def _repeats(match: NDArray[np.int64], whole: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """(n,) mask of rows that equal an earlier one; rows are sorted by decision."""
    order = np.lexsort((np.arange(len(match)), whole, match))
    same = (match[order][1:] == match[order][:-1]) & (whole[order][1:] == whole[order][:-1])
    found = np.zeros(len(match), dtype=bool)
    found[order[1:][same]] = True
    return found


def _find(keys: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(n,) index of each wanted key in sorted distinct keys; -1 where it is none."""
    found = np.full(len(wanted), -1, dtype=np.int64)
    if not len(keys):
        return found
    # Equal first halves are compared by their second ones; there is hardly more than one of each.
    at = np.searchsorted(keys[:, 0], wanted[:, 0])
    open_ = np.arange(len(wanted))
    while open_.size:
        inside = open_[at[open_] < len(keys)]
        inside = inside[keys[at[inside], 0] == wanted[inside, 0]]
        hit = keys[at[inside], 1] == wanted[inside, 1]
        found[inside[hit]] = at[inside[hit]]
        open_ = inside[~hit]
        at[open_] += 1
    return found


def _keys(columns: list[pa.ChunkedArray]) -> NDArray[np.uint64]:
    """(n, 2) hashes of the rows of some columns: text and integers by value, others by bits."""
    n = len(columns[0])
    found = np.empty((n, 2), dtype=np.uint64)
    found[:] = _SEEDS
    for column in columns:
        values, index = distinct_values(column) if is_category(column.type) else _bits(column)
        for half, seed in enumerate(_SEEDS):
            # Text is hashed anew for each half, with another first word: equal halves of two texts
            # must not imply that the others are equal.
            of_value = hash_values(_salted(values, half))
            key = np.append(splitmix64(of_value ^ seed), seed)[index]
            found[:, half] = splitmix64(found[:, half] ^ key)
    return found


def _salted(values: pa.Array, half: int) -> pa.Array:
    if half == 0 or not is_text(values.type):
        return values
    first, end = (pa.scalar(text, pa.large_string()) for text in ("offtower", ""))
    return pc.binary_join_element_wise(first, pc.cast(values, pa.large_string()), end)


def _bits(column: pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int64]]:
    numbers = (
        comparable_times(column)
        if pa.types.is_temporal(column.type)
        else as_float_array(column).view(np.int64)
    )
    return distinct_values(pa.array(numbers))


def _hashable(table: pa.Table) -> list[str]:
    return [
        field.name
        for field in table.schema
        if is_category(field.type) or is_number(field.type) or pa.types.is_timestamp(field.type)
    ]


def _need(table: pa.Table, names: list[str], what: str) -> None:
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise DataError(
            f"{what} have no column '{missing[0]}'; they have {', '.join(table.column_names)}"
        )


def _with_rewards(
    decisions: Tables, plan: JoinPlan, rewards: NDArray[np.float64]
) -> Iterator[pa.Table]:
    first = 0
    for table in decisions():
        rows = range(first, first + table.num_rows)
        first = rows.stop
        joined = table
        for reward, values in zip(plan.rewards, rewards, strict=True):
            part = np.asarray(values[rows.start : rows.stop])
            joined = joined.append_column(reward.name, pa.array(part, mask=np.isnan(part)))
        yield joined


def _outcome_type(rewards: int) -> np.dtype[Any]:
    return np.dtype(
        [
            ("key", "u8", 2),
            ("order", "i8"),
            ("time", "i8"),
            ("limit", "i8"),
            ("whole", "u8"),
            ("value", "f8", (rewards,)),
        ]
    )


@dataclass
class _Spill:
    """Records by partition, in files that are opened for each write."""

    folder: Path
    kind: np.dtype[Any]
    waiting: list[NDArray[Any]] = field(default_factory=list)
    rows: int = 0

    def add(self, records: NDArray[Any]) -> None:
        """Keep records until there are enough for a write to each file."""
        self.waiting.append(records)
        self.rows += len(records)
        if self.rows >= 4096 * _PARTITIONS:
            self.close()

    def close(self) -> None:
        """Write what waits."""
        if not self.waiting:
            return
        records = np.concatenate(self.waiting)
        self.waiting, self.rows = [], 0
        partition = (records["key"][:, 0] >> np.uint64(56)).astype(np.int64)
        order = np.argsort(partition, kind="stable")
        ends = np.cumsum(np.bincount(partition, minlength=_PARTITIONS))
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(np.split(records[order], ends[:-1])):
            if len(part):
                with open(self.folder / str(number), "ab") as file:
                    part.tofile(file)

    def read(self, partition: int) -> NDArray[Any]:
        """Read the records of a partition."""
        path = self.folder / str(partition)
        if not path.exists():
            return np.empty(0, dtype=self.kind)
        return np.fromfile(path, dtype=self.kind)
