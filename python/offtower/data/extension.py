"""Encodings that are extended for new rows: known values keep their embeddings, new ones get some.

The rows of a table of embeddings are the unknown value and then the vocabulary. An extended
vocabulary is made of the known values that stay, in their order, and then of the new ones, sorted.
`TableRows` records where each row comes from, by which weights and optimizer state follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from offtower.checksums import read_checked_json, write_checked_json
from offtower.data.columns import as_array
from offtower.data.encoding import FeatureEncoding
from offtower.data.encoding_fit import EncodingSums, ValueCounter, has_vocabulary
from offtower.data.feature_columns import fitted_categories
from offtower.data.lookup import Vocabulary
from offtower.data.schema import FeatureSpec
from offtower.errors import DataError

IntArray = NDArray[np.int64]

ALWAYS_ADMITTED = 100
"""New values of a feature that no growth limit refuses."""
_FILE = "rows.json"
_SAME = ("kind", "source", "encoding", "embedding_dim", "times", "events", "dwell")


@dataclass(frozen=True)
class ExtensionRules:
    """When values get embeddings, and lose them.

    Attributes:
        min_count: rows with a new value before it gets one; None is each feature's own.
        evict_after: runs without a known value after which it loses its own; None never.
        moving: weight of the new rows in means and variances.
        max_growth: most new values as a multiple of the known ones.
    """

    min_count: int | None = None
    evict_after: int | None = None
    moving: float = 0.0
    max_growth: float = 2.0


@dataclass(frozen=True, eq=False)
class TableRows:
    """The rows of one feature's embeddings, compared with those of the run before.

    Attributes:
        origin: (1 + n,) row in the table of the run before, from the unknown value on; -1 for new
            values.
        seen: (n,) number of the last run in which each value occurred.
        waiting: values that are too rare so far, with the columns value, count and seen.
        evicted: number of values that left.
    """

    origin: IntArray
    seen: IntArray
    waiting: pa.Table | None = None
    evicted: int = 0

    @property
    def new(self) -> IntArray:
        """Rows of the new values."""
        return np.flatnonzero(self.origin < 0)

    @property
    def text(self) -> str:
        """Counts, for messages."""
        known, new = len(self.origin) - 1 - len(self.new), len(self.new)
        waiting = 0 if self.waiting is None else self.waiting.num_rows
        parts = {"known": known, "new": new, "too rare so far": waiting, "removed": self.evicted}
        return ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)


@dataclass(frozen=True)
class Extension:
    """An extended encoding and the rows of its tables, by feature."""

    encoding: FeatureEncoding
    rows: Mapping[str, TableRows]


@dataclass(frozen=True)
class ExtensionBasis:
    """What is extended.

    Attributes:
        encoding: of the run before.
        rows: its `TableRows`; a run that was not extended has none.
        number: of the new run, 1 more than that of the run before, which begins at 0.
        rules: see there.
        accumulate: whether counts of rare values add up over runs, as those of a log do.
        ids: by feature, the vocabulary of features whose values are the catalogue's items: those
            of removed items leave at once, and new ones need no count.
    """

    encoding: FeatureEncoding
    rows: Mapping[str, TableRows]
    number: int
    rules: ExtensionRules
    accumulate: bool
    ids: Mapping[str, pa.Array]

    def extend(self, sums: EncodingSums, where: str) -> Extension:
        """Extend the encoding by what a pass over new rows found.

        Args:
            sums: of these rows.
            where: names them, for messages.

        Raises:
            DataError: the features are others, or a vocabulary grew beyond the limit.
        """
        check_same_features(self.encoding, sums, where)
        rows: dict[str, TableRows] = {}
        vocabulary: dict[str, pa.Array] = {}
        for spec in sums.parts:
            if spec.name not in self.ids and not has_vocabulary(spec):
                continue
            found = self._counted(spec, sums.counts)
            rows[spec.name], vocabulary[spec.name] = self._table(spec, found, where)
        types = {k: v for k, v in sums.types.items() if k not in self.encoding.types}
        encoding = self.encoding.extended(vocabulary, types, sums.moments, self.rules.moving)
        return Extension(encoding, rows)

    def _counted(self, spec: FeatureSpec, counts: Mapping[str, ValueCounter]) -> pa.Table:
        """Values and counts of the new rows, of the type that the encoding was fitted on."""
        known = self.encoding.vocabulary(spec.name)
        if spec.name in self.ids:
            values, count = self.ids[spec.name], np.ones(len(self.ids[spec.name]), dtype=np.int64)
        elif spec.name in counts:
            table = counts[spec.name].table()
            values, count = table.column("value"), table.column("count").to_numpy()
        else:
            values, count = known[:0], np.zeros(0, dtype=np.int64)
        fitted = self.encoding.types.get(spec.name)
        if fitted is not None:
            values = fitted_categories(spec, values, fitted)
        if len(known):
            values = pc.cast(values, known.type)
        return pa.table({"value": as_array(values), "count": count})

    def _table(self, spec: FeatureSpec, found: pa.Table, where: str) -> tuple[TableRows, pa.Array]:
        rules, number, exact = self.rules, self.number, spec.name in self.ids
        known = self.encoding.vocabulary(spec.name)
        before = self.rows.get(spec.name)
        values = as_array(found.column("value"))
        count = found.column("count").to_numpy()
        index = Vocabulary(known).find(values) if len(known) else np.full(len(values), -1)
        seen = np.zeros(len(known), dtype=np.int64) if before is None else before.seen.copy()
        seen[index[index >= 0]] = number
        stays = np.ones(len(known), dtype=bool)
        if exact:
            stays = seen == number
        elif rules.evict_after is not None:
            stays = number - seen < rules.evict_after
        fresh = pa.table(
            {
                "value": values.filter(pa.array(index < 0)),
                "count": count[index < 0],
                "seen": np.full(int((index < 0).sum()), number),
            }
        )
        if self.accumulate and before is not None and before.waiting is not None:
            fresh = _added(fresh, before.waiting)
        least = 1 if exact else rules.min_count or spec.min_count
        enough = pc.greater_equal(fresh.column("count"), least)
        new = as_array(fresh.filter(enough).column("value"))
        new = new.take(pc.sort_indices(new))
        _check_growth(spec, len(known), len(new), rules.max_growth, where)
        waiting = fresh.filter(pc.invert(enough)) if self.accumulate else fresh[:0]
        if rules.evict_after is not None:
            recent = pc.greater(waiting.column("seen"), number - rules.evict_after)
            waiting = waiting.filter(recent)
        kept = np.flatnonzero(stays)
        rows = TableRows(
            np.concatenate([[0], 1 + kept, np.full(len(new), -1)]).astype(np.int64),
            np.concatenate([seen[kept], np.full(len(new), number)]).astype(np.int64),
            waiting,
            int(len(known) - len(kept)),
        )
        old = known.take(pa.array(kept))
        return rows, new if not len(old) else pa.concat_arrays([old, pc.cast(new, old.type)])


def check_same_features(encoding: FeatureEncoding, sums: EncodingSums, where: str) -> None:
    """Compare features with those of an encoding.

    Raises:
        DataError: one is new, missing, or of another kind or size; names it and what to do.
    """
    before, after = ({s.name: s for s in one} for one in (encoding.specs, sums.specs))
    remedy = (
        "; the layers of the earlier run read its own features. Give these features, or train a "
        "new run without incremental.from_run"
    )
    for name in sorted({*before, *after}):
        if name not in after:
            raise DataError(f"{where} has no feature '{name}', which the earlier run has{remedy}")
        if name not in before:
            raise DataError(f"{where} has a feature '{name}', which the earlier run lacks{remedy}")
        old, new = before[name], after[name]
        compared = [*_SAME]
        compared += ["buckets"] if old.encoding == new.encoding == "hash" else []
        compared += ["most_events"] if old.history else []
        compared += ["most_characters", "hashed_tokens"] if old.kind == new.kind == "text" else []
        names = [n for n in compared if getattr(old, n) != getattr(new, n)]
        if old.kind == new.kind == "vector" and old.dim != new.dim:
            names.append("dim")
        if names:
            what = "; ".join(f"{n} {getattr(old, n)!r} -> {getattr(new, n)!r}" for n in names)
            raise DataError(f"feature '{name}' of {where} has changed ({what}){remedy}")


def check_removed(before: pa.Array | int, after: pa.Array, limit: float, where: str) -> str:
    """Compare a catalogue with that of the run before.

    Args:
        before: its ids, or their number where they are not known.
        limit: largest share of items that may have left.

    Returns:
        What became of the items, for a message.

    Raises:
        DataError: more items have left.
    """
    if isinstance(before, int):
        total, left = before, max(0, before - len(after))
        text = f"{total:,} items before, {len(after):,} now"
    else:
        total = len(before)
        there = Vocabulary(before).find(pc.cast(after, before.type)) if total else np.zeros(0)
        left = total - int((there >= 0).sum())
        text = f"{total - left:,} items stay, {len(after) - total + left:,} are new, {left:,} left"
    if left > limit * total:
        raise DataError(
            f"{where} lacks {left:,} of the {total:,} items of the earlier run, more than the "
            f"share of {limit:g} that incremental.max_removed allows. If the catalogue is "
            "complete, raise that limit (--set incremental.max_removed=1): the embeddings "
            "of these items are removed. If items are only unavailable, keep them and name an "
            "attribute in the schema's section 'eligible'"
        )
    return text


def save_rows(directory: Path, rows: Mapping[str, TableRows]) -> None:
    """Write the rows of all tables of an encoding."""
    directory.mkdir()
    listed: dict[str, Any] = {}
    for number, (name, one) in enumerate(rows.items()):
        files = {"rows": f"rows_{number}.parquet"}
        seen = np.concatenate([[0], one.seen])
        pq.write_table(pa.table({"origin": one.origin, "seen": seen}), directory / files["rows"])
        if one.waiting is not None and one.waiting.num_rows:
            files["waiting"] = f"waiting_{number}.parquet"
            pq.write_table(one.waiting, directory / files["waiting"])
        listed[name] = {**files, "evicted": one.evicted}
    write_checked_json(directory / _FILE, {"features": listed})


def load_rows(directory: Path) -> dict[str, TableRows]:
    """Read what `save_rows` wrote; empty where there is nothing."""
    if not (directory / _FILE).exists():
        return {}
    found = {}
    for name, files in read_checked_json(directory / _FILE)["features"].items():
        table = pq.read_table(directory / files["rows"])
        waiting = None
        if "waiting" in files:
            waiting = pq.read_table(directory / files["waiting"])
        origin, seen = (table.column(one).to_numpy().copy() for one in ("origin", "seen"))
        found[name] = TableRows(origin, seen[1:], waiting, int(files["evicted"]))
    return found


def _check_growth(spec: FeatureSpec, known: int, new: int, limit: float, where: str) -> None:
    if new > max(ALWAYS_ADMITTED, limit * max(1, known)):
        needed = math.ceil(new / max(1, known))
        raise DataError(
            f"feature '{spec.name}' of {where} has {new:,} new values beside {known:,} known ones, "
            f"more than incremental.max_growth={limit:g} times as many. If that is right, raise "
            f"the limit (--set incremental.max_growth={needed}); raise incremental.min_count to "
            "leave rare values out; for values without end, such as ids of requests, leave the "
            "feature out or set its encoding to 'hash' in a new run"
        )


def _added(fresh: pa.Table, waiting: pa.Table) -> pa.Table:
    """Sum the counts of values that wait from earlier runs."""
    before = waiting.cast(fresh.schema) if fresh.num_rows else waiting
    joined = pa.concat_tables([fresh.cast(before.schema), before])
    by_value = joined.group_by("value", use_threads=False)
    summed = by_value.aggregate([("count", "sum"), ("seen", "max")])
    return summed.rename_columns(
        [{"count_sum": "count", "seen_max": "seen"}.get(n, n) for n in summed.column_names]
    ).select(["value", "count", "seen"])
