"""Retrieval metrics over the full catalogue, weighted by inverse propensity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.columns import as_float_array
from offtower.data.log import Log
from offtower.errors import ConfigError, DataError
from offtower.progress import Progress
from offtower.retrieval.exact import recall
from offtower.retrieval.retriever import Retriever

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class RetrievalQuality:
    """Self-normalized means over rewarded rows, weighted by reward / pscore, at one k.

    Attributes:
        recall: share of rewarded items among the k first. It estimates sum q(x, a) over the k first
            divided by sum q(x, a) over all items, for the log's contexts.
        ndcg: mean of 1 / log2(1 + rank) of the rewarded item, 0 beyond k.
        coverage: share of the catalogue among the k first of any context.
        recall_error, ndcg_error: standard errors (delta method).
        value_first, value_first_error: IPS value of always showing the first item, over all rows,
            and its standard error.
        index_recall: share of the exact k first that the index finds; None without an index.
        rows, rewarded_rows: numbers of rows of the log.
    """

    k: int
    recall: float
    recall_error: float
    ndcg: float
    ndcg_error: float
    coverage: float
    value_first: float
    value_first_error: float
    index_recall: float | None
    rows: int
    rewarded_rows: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def retrieval_quality(
    retriever: Retriever,
    log: Log,
    ks: Iterable[int] = (10, 100),
    *,
    batch_rows: int = 1024,
    progress: Progress | None = None,
) -> list[RetrievalQuality]:
    """Compute recall@k, NDCG@k and coverage on a held-out log.

    Rewarded rows are weighted by 1 / pscore, which corrects for the items that the logging policy
    showed more often. Of slates with conditional propensities these are the rows of position 0.
    Memory is 16 bytes per rewarded row, and a byte per item and k.

    Returns:
        One result per k, in ascending order.

    Raises:
        ConfigError: a k is not in [1, N].
        DataError: the log has no propensities, or no row with a reward.
    """
    schema, progress = log.schema, progress or Progress()
    if schema.pscore is None:
        raise DataError(
            "retrieval quality weights rows by inverse propensity: the log has no pscore"
        )
    if schema.pscore_kind == "slate":
        raise DataError(
            "retrieval quality weights rows by the propensity of their item, and pscore is that of "
            "whole slates (pscore_kind: slate)"
        )
    sizes = check_sizes(retriever, ks)
    seen = {k: np.zeros(retriever.num_items, dtype=bool) for k in sizes}
    found = dict.fromkeys(sizes, 0.0)
    weights: list[FloatArray] = []
    ranks: list[IntArray] = []
    first_sum, first_square, rows = 0.0, 0.0, 0
    progress.start("retrieval", None)
    for table in _batches(log, batch_rows):
        if schema.slates:
            table = table.filter(pa.array(as_float_array(table.column(schema.position)) == 0.0))
        reward = as_float_array(table.column(schema.reward))
        weight = reward / as_float_array(table.column(schema.pscore))
        action = retriever.numbers_of(table.column(schema.action).to_pylist())
        exact = _matrix(retriever.search(table, sizes[-1], exact=True).item, sizes[-1])
        shown = exact
        if retriever.index is not None:
            shown = _matrix(retriever.search(table, sizes[-1]).item, sizes[-1])
        # -1 is both an unknown item and padding.
        hit = (shown == action[:, None]) & (action >= 0)[:, None]
        rank = np.where(hit.any(axis=1), hit.argmax(axis=1), retriever.num_items)
        for k in sizes:
            seen[k][shown[:, :k][shown[:, :k] >= 0]] = True
            if retriever.index is not None:
                found[k] += float(recall(shown[:, :k], exact[:, :k]).sum())
        first = np.where(rank == 0, weight, 0.0)
        first_sum += float(first.sum())
        first_square += float(first @ first)
        rows += len(reward)
        rewarded = weight > 0.0
        weights.append(weight[rewarded])
        ranks.append(rank[rewarded])
        progress.advance(len(reward))
    progress.finish()
    weight, rank = np.concatenate(weights), np.concatenate(ranks)
    if not weight.size:
        raise DataError("the log has no row with a positive reward")
    value = first_sum / rows
    value_error = (max(first_square / rows - value**2, 0.0) / rows) ** 0.5
    out = []
    for k in sizes:
        inside = rank < k
        gain = np.where(inside, 1.0 / np.log2(2.0 + rank), 0.0)
        out.append(
            RetrievalQuality(
                k,
                *_weighted(weight, inside.astype(np.float64)),
                *_weighted(weight, gain),
                float(seen[k].mean()),
                value,
                value_error,
                found[k] / rows if retriever.index is not None else None,
                rows,
                len(weight),
            )
        )
    return out


def check_sizes(retriever: Retriever, ks: Iterable[int]) -> list[int]:
    """Return the distinct ks in ascending order.

    Raises:
        ConfigError: there is none, or one is not in [1, N].
    """
    sizes = sorted(set(ks))
    if not sizes or sizes[0] < 1 or sizes[-1] > retriever.num_items:
        raise ConfigError(
            f"k of recall@k must lie in [1, {retriever.num_items}], the number of items, got "
            + (", ".join(str(k) for k in sizes) or "none")
        )
    return sizes


def _matrix(items: Sequence[IntArray], k: int) -> IntArray:
    """(n, k) item numbers, padded with -1."""
    out = np.full((len(items), k), -1, dtype=np.int64)
    for row, found in zip(out, items, strict=True):
        row[: len(found)] = found
    return out


def _weighted(weight: FloatArray, value: FloatArray) -> tuple[float, float]:
    """Self-normalized mean and its standard error."""
    total = weight.sum()
    # Summed as the total is, so that the mean of ones is 1.
    mean = float((weight * value).sum() / total)
    return mean, float(np.sqrt(np.sum((weight * (value - mean)) ** 2)) / total)


def _batches(log: Log, rows: int) -> Iterator[pa.Table]:
    for table in log.tables():
        for first in range(0, table.num_rows, rows):
            yield table.slice(first, rows)
