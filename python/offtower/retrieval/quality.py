"""How well retrieval finds what was rewarded, over the full catalogue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from offtower.data.columns import as_float_array
from offtower.data.log import Log
from offtower.errors import DataError
from offtower.retrieval.retriever import Retriever


@dataclass(frozen=True)
class RetrievalQuality:
    """Means over rewarded rows, each weighted by reward / pscore (self-normalised), at one k.

    Attributes:
        recall: share of rewarded items that are among the k first.
        ndcg: mean of 1 / log2(1 + rank) of the rewarded item, 0 beyond k.
        coverage: share of the catalogue that is among the k first of any of these contexts.
        recall_error, ndcg_error: standard errors (delta method).
        value_first: IPS value of showing the first item, over all rows.
        index_recall: share of the exact k first that the index finds; None without an index.
        rows, rewarded_rows: of the log.
    """

    k: int
    recall: float
    recall_error: float
    ndcg: float
    ndcg_error: float
    coverage: float
    value_first: float
    index_recall: float | None
    rows: int
    rewarded_rows: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def retrieval_quality(
    retriever: Retriever, log: Log, ks: Iterable[int] = (10, 100), *, batch_rows: int = 1024
) -> list[RetrievalQuality]:
    """Recall@k, NDCG@k and coverage on a held-out log, weighted by inverse propensity.

    A rewarded row says that its item was wanted; it is there because the logging policy showed it.
    Weighting by 1 / pscore makes every wanted (context, item) pair count alike.

    Raises:
        DataError: the log has no propensities, or no row with a reward.
    """
    schema = log.schema
    if schema.pscore is None:
        raise DataError(
            "retrieval quality weighs rows by inverse propensity: the log has no pscore"
        )
    sizes = sorted(set(ks))
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    seen = {k: np.zeros(retriever.num_items, dtype=bool) for k in sizes}
    found = dict.fromkeys(sizes, 0.0)
    first_value, rows = 0.0, 0
    for table in _batches(log, batch_rows):
        reward = as_float_array(table.column(schema.reward))
        weight = reward / as_float_array(table.column(schema.pscore))
        action = retriever.numbers_of(table.column(schema.action).to_pylist())
        deepest = min(max(sizes), retriever.num_items)
        exact = retriever.search(table, deepest, exact=True)
        shown = retriever.search(table, deepest) if retriever.index is not None else exact
        rank = np.full(len(reward), np.inf)
        for row, items in enumerate(shown.item):
            place = np.flatnonzero(items == action[row])
            if place.size:
                rank[row] = place[0]
            for k in sizes:
                seen[k][items[:k]] = True
                found[k] += np.isin(exact.item[row][:k], items[:k]).mean()
        first_value += float(weight[rank == 0].sum())
        rows += len(reward)
        rewarded = weight > 0.0
        parts.append((weight[rewarded], rank[rewarded]))
    weight = np.concatenate([w for w, _ in parts])
    rank = np.concatenate([r for _, r in parts])
    if not weight.size:
        raise DataError("the log has no row with a positive reward")
    out = []
    for k in sizes:
        hit = rank < k
        gain = np.where(hit, 1.0 / np.log2(2.0 + np.where(hit, rank, 0.0)), 0.0)
        recall, recall_error = _weighted(weight, hit.astype(np.float64))
        ndcg, ndcg_error = _weighted(weight, gain)
        out.append(
            RetrievalQuality(
                k,
                recall,
                recall_error,
                ndcg,
                ndcg_error,
                float(seen[k].mean()),
                first_value / rows,
                found[k] / rows if retriever.index is not None else None,
                rows,
                len(weight),
            )
        )
    return out


def _weighted(weight: np.ndarray, value: np.ndarray) -> tuple[float, float]:
    """Self-normalised mean and its standard error."""
    total = weight.sum()
    mean = float(weight @ value / total)
    return mean, float(np.sqrt(np.sum((weight * (value - mean)) ** 2)) / total)


def _batches(log: Log, rows: int) -> Iterable[pa.Table]:
    for table in log.tables():
        for first in range(0, table.num_rows, rows):
            yield table.slice(first, rows)
