"""Simple policies that every evaluation is compared with: uniform, and lists of popular items.

The lists are made from the training log, so that the evaluated rows do not choose them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.columns import as_float_array
from offtower.data.encoding import FeatureEncoding
from offtower.data.log import Log
from offtower.data.rows import EncodedRows
from offtower.evaluation.estimators import make_estimator
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.result import EstimatorResult
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring.weighted_rows import slate_rows, weighted_rows
from offtower.evaluation.sums import EvaluationSums
from offtower.progress import Progress

UNIFORM = "uniform"
MOST_REWARDED = "most rewarded items"
MOST_ROWS = 10_000_000
"""Rows of the training log that the lists are made from, spread over the log."""
LENGTH = 100
"""Items of a list."""
_MIN_EFFECTIVE_ROWS = 10.0
_MOST_SEGMENTS = 1000
_MOST_PAIRS = 10_000_000
"""Pairs of a segment and an item whose rewards are kept; those of smallest reward go first."""

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Baselines:
    """Uniform draws, the most rewarded items for all, and those of each segment.

    Attributes:
        num_items: items of the catalogue.
        most_rewarded: (L,) items by their sum of rewards, largest first; empty without a log.
        segment: the category that divides contexts; None without one.
        by_segment: (L,) items by code of the category.
    """

    num_items: int
    most_rewarded: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    segment: str | None = None
    by_segment: Mapping[int, IntArray] = field(default_factory=dict)

    @classmethod
    def fit(
        cls, log: Log, catalogue: Catalogue, encoding: FeatureEncoding, progress: Progress
    ) -> Baselines:
        """Sum the rewards of the training log by item, and by segment and item.

        The segment is the first category of the contexts with 2 to 1,000 values.

        Args:
            encoding: of the contexts, whose codes `rows` finds again.
        """
        segment = _segment(encoding)
        only = None if segment is None else encoding.only(segment)
        all_items = _RewardSums(catalogue.num_items)
        by_segment = _RewardSums(catalogue.num_items)
        schema = log.schema
        columns = [schema.action, schema.reward]
        if only is not None:
            columns.append(only.specs[0].source)
        groups = _spread(log.row_group_sizes, MOST_ROWS)
        progress.start("counting the rewards of items", int(log.row_group_sizes[groups].sum()))
        for table in log.read_row_groups(groups, list(dict.fromkeys(columns))):
            item = catalogue.index_of(table.column(schema.action))
            reward = as_float_array(table.column(schema.reward))
            known = (item >= 0) & np.isfinite(reward)
            all_items.add(np.zeros(int(known.sum()), dtype=np.int64), item[known], reward[known])
            if only is not None and segment is not None:
                code = np.asarray(only.encode(table)[segment])
                by_segment.add(code[known], item[known], reward[known])
            progress.advance(table.num_rows)
        progress.finish()
        lists = dict(all_items.best(LENGTH))
        return cls(
            catalogue.num_items,
            lists.get(0, np.zeros(0, dtype=np.int64)),
            segment,
            dict(by_segment.best(LENGTH)),
        )

    def rows(self, rows: EncodedRows) -> dict[str, EvaluationRows]:
        """The logged rows as each baseline sees them, by its name.

        Args:
            rows: n rows with propensities, of whole rounds where the log has slates.
        """
        count = np.full(len(rows), self.num_items) if rows.eligible is None else None
        if count is None:
            assert rows.eligible is not None
            count = rows.eligible.count()
        found = {UNIFORM: weighted_rows(rows, torch.from_numpy(-np.log(count)))}
        if self.most_rewarded.size:
            shown = shown_items(rows, self.most_rewarded)
            found[MOST_REWARDED] = _deterministic(rows, shown)
        if self.segment is not None and self.by_segment:
            found[f"{MOST_REWARDED} by {self.segment}"] = _deterministic(
                rows, self._of_segments(rows)
            )
        return found

    def _of_segments(self, rows: EncodedRows) -> IntArray:
        assert self.segment is not None
        code, rows = np.asarray(rows.context[self.segment]), rows.without_context()
        shown = np.full(len(rows), -1, dtype=np.int64)
        for one in np.unique(code):
            index = np.flatnonzero(code == one)
            best = self.by_segment.get(int(one), self.most_rewarded)
            shown[index] = shown_items(rows.take(index), best)
        return shown


def shown_items(rows: EncodedRows, best: IntArray) -> IntArray:
    """(n,) the item of the list `best` at each row's position; -1 where the list has ended.

    Items that a row may not show are passed over.
    """
    position = np.zeros(len(rows), dtype=np.int64) if rows.position is None else rows.position
    if rows.eligible is None:
        inside = (position >= 0) & (position < best.size)
        return np.where(inside, best[np.clip(position, 0, best.size - 1)], -1)
    shown = np.full(len(rows), -1, dtype=np.int64)
    left = position.copy()
    for item in best.tolist():
        open_rows = np.flatnonzero(shown < 0)
        if not open_rows.size:
            break
        part = rows.eligible.take(open_rows)
        can = part.contains(np.full(open_rows.size, item, dtype=np.int64))
        at = open_rows[can & (left[open_rows] == 0)]
        shown[at] = item
        left[open_rows[can]] -= 1
    return shown


def _deterministic(rows: EncodedRows, shown: IntArray) -> EvaluationRows:
    """Rows under a policy that shows `shown` (n,) for certain."""
    log_prob = torch.from_numpy(np.where(rows.action == shown, 0.0, -np.inf))
    if rows.rounds is not None:
        return slate_rows(rows, rows.rounds, log_prob)
    return weighted_rows(rows, log_prob)


def baseline_options(options: EvaluationOptions) -> EvaluationOptions:
    """How baselines are evaluated: by SNIPS, or IPS where the evaluation has that only."""
    found = {one.label: one for one in options.estimators}
    chosen = found.get("snips") or found.get("ips") or make_estimator("snips")
    return replace(
        options,
        estimators=(chosen,),
        decide_by="auto",
        intervals=("auto",),
        verdict_confidences=(),
    )


def baseline_values(sums: EvaluationSums) -> tuple[dict[str, EstimatorResult], list[str]]:
    """The value of each baseline that the log can tell, and a note on the others."""
    found = sums.estimates(_MIN_EFFECTIVE_ROWS)
    missing = [name for name, one in found.items() if one is None]
    notes = []
    if missing:
        notes.append(
            "baselines not shown, since the log has fewer than "
            f"{_MIN_EFFECTIVE_ROWS:g} effective rows for them: " + ", ".join(missing)
        )
    return {name: one for name, one in found.items() if one is not None}, notes


class _RewardSums:
    """Sums of rewards by segment and item, of bounded size."""

    def __init__(self, num_items: int) -> None:
        self._num_items = num_items
        self._key = np.zeros(0, dtype=np.int64)
        self._sum: NDArray[np.float64] = np.zeros(0)

    def add(self, segment: IntArray, item: IntArray, reward: NDArray[np.float64]) -> None:
        key = np.concatenate([self._key, segment * self._num_items + item])
        self._key, index = np.unique(key, return_inverse=True)
        total = np.concatenate([self._sum, reward])
        self._sum = np.zeros(self._key.size)
        np.add.at(self._sum, index, total)
        if self._key.size > 2 * _MOST_PAIRS:
            kept = np.sort(np.argpartition(-self._sum, _MOST_PAIRS)[:_MOST_PAIRS])
            self._key, self._sum = self._key[kept], self._sum[kept]

    def best(self, length: int) -> Iterator[tuple[int, IntArray]]:
        """(segment, its items of largest sums); ties in the order of item numbers."""
        segment = self._key // self._num_items
        for one in np.unique(segment):
            index = np.flatnonzero(segment == one)
            order = index[np.argsort(-self._sum[index], kind="stable")][:length]
            yield int(one), self._key[order] % self._num_items


def _segment(encoding: FeatureEncoding) -> str | None:
    for spec in encoding.specs:
        if spec.kind == "category" and 3 <= encoding.cardinality(spec.name) <= _MOST_SEGMENTS + 1:
            return spec.name
    return None


def _spread(sizes: NDArray[np.int64], most_rows: int) -> IntArray:
    """Row groups spread evenly over the log, of at most about `most_rows` rows, at least one."""
    total = int(sizes.sum())
    if total <= most_rows:
        return np.arange(len(sizes))
    count = max(1, int(len(sizes) * most_rows / total))
    return np.unique(np.linspace(0, len(sizes) - 1, count).astype(np.int64))
