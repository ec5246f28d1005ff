"""Recall, NDCG and coverage weighted by inverse propensity, against enumeration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from offtower.data.log import ParquetLog, TableLog
from offtower.data.schema import FeatureSpec, LogSchema
from offtower.errors import ConfigError, DataError
from offtower.retrieval import Retriever, retrieval_quality

SCHEMA = LogSchema(context=(FeatureSpec(name="context", kind="numeric"),))


class Ranked:
    """A retriever whose rankings are given: (contexts, N) items by rank, exact and by an index."""

    def __init__(self, exact: np.ndarray, index: np.ndarray | None = None) -> None:
        self.exact, self.index, self.num_items = exact, index, exact.shape[1]

    def search(self, contexts: pa.Table, k: int, *, exact: bool = False) -> Any:
        ranking = self.exact if exact or self.index is None else self.index
        rows = contexts.column("context").to_numpy().astype(int)
        return SimpleNamespace(item=[found[found >= 0][:k] for found in ranking[rows]])

    def numbers_of(self, ids: list[int]) -> np.ndarray:
        return np.asarray([i if i < self.num_items else -1 for i in ids])


def quality(retriever: Ranked, ks: list[int], batch_rows: int = 3, **columns: Any) -> Any:
    table = pa.table({name: np.asarray(value, dtype=float) for name, value in columns.items()})
    table = table.set_column(1, "action", pa.array(np.asarray(columns["action"])))
    return retrieval_quality(retriever, TableLog(table, SCHEMA), ks, batch_rows=batch_rows)  # type: ignore[arg-type]


def test_values_worked_out_by_hand() -> None:
    exact = np.asarray([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    # The index finds one item fewer, and another in the second place of context 1.
    index = np.asarray([[0, 1, 2, 3, -1], [4, 2, 3, 1, -1]])
    columns = {
        "context": [0, 0, 1, 1, 0],
        "action": [0, 2, 2, 0, 9],  # 9 is not in the catalogue.
        "reward": [1, 1, 2, 0, 1],
        "pscore": [0.5, 0.25, 0.5, 0.1, 0.5],
    }
    one, two = quality(Ranked(exact, index), [2, 1], **columns)
    # Weights 2, 4, 4, 0, 2; ranks in the index 0, 2, 1, none, none.
    assert (one.k, two.k) == (1, 2)
    assert one.recall == pytest.approx(2 / 12) and one.ndcg == pytest.approx(2 / 12)
    assert two.recall == pytest.approx(6 / 12)
    assert two.ndcg == pytest.approx((2 + 4 / np.log2(3)) / 12)
    assert one.coverage == pytest.approx(2 / 5) and two.coverage == pytest.approx(4 / 5)
    # Contexts 0, 0, 1, 1, 0 share 2, 2, 1, 1, 2 of their two first with the exact ones.
    assert two.index_recall == pytest.approx(8 / 10) and one.index_recall == 1.0
    assert one.value_first == pytest.approx(2 / 5)
    value = np.asarray([2.0, 0, 0, 0, 0])
    assert one.value_first_error == pytest.approx(value.std() / 5**0.5)
    miss = np.asarray([2 * 0.5, 4 * 0.5, 4 * 0.5, 2 * 0.5])
    assert two.recall_error == pytest.approx(np.sqrt(np.sum(miss**2)) / 12)
    assert (one.rows, one.rewarded_rows) == (5, 4)
    assert quality(Ranked(exact), [2], **columns)[0].index_recall is None


def test_weighted_recall_is_that_of_all_wanted_pairs() -> None:
    """q(x, a) is known: the share of its sum that lies in the k first, estimated from 300 logs of a
    policy far from uniform. Intervals of two standard errors hold it in 95 % of logs, so in at
    least 90 % of 300 (false-alarm rate 1.3e-4 each). The mean value lies within 4 of its standard
    errors (6e-5)."""
    rng = np.random.default_rng(0)
    contexts, items, k, logs, rows = 20, 30, 5, 300, 1000
    q = rng.random((contexts, items)) ** 3
    ranking = np.argsort(-(q + 0.3 * rng.random(q.shape)), axis=1)
    behavior = rng.dirichlet(np.full(items, 2.0), size=contexts) * 0.8 + 0.2 / items
    inside = np.take_along_axis(q, ranking[:, :k], 1)
    truth = {"recall": inside.sum() / q.sum()}
    truth["ndcg"] = (inside / np.log2(2 + np.arange(k))).sum() / q.sum()
    first = np.take_along_axis(q, ranking[:, :1], 1).mean()
    inside_errors, values = {"recall": 0, "ndcg": 0}, []
    for _ in range(logs):
        x = rng.integers(contexts, size=rows)
        u = rng.random((rows, 1))
        a = np.minimum((behavior.cumsum(1)[x] < u).sum(1), items - 1)
        found = quality(
            Ranked(ranking),
            [k],
            batch_rows=rows,
            context=x,
            action=a,
            reward=rng.random(rows) < q[x, a],
            pscore=behavior[x, a],
        )[0]
        for name, value in truth.items():
            error = getattr(found, f"{name}_error")
            inside_errors[name] += abs(getattr(found, name) - value) <= 2.0 * error
        values.append(found.value_first)
    assert all(count >= 0.9 * logs for count in inside_errors.values()), inside_errors
    z = (np.mean(values) - first) / (np.std(values) / logs**0.5)
    assert abs(z) < 4.0


def test_an_export_against_the_policys_own_ranking(run: Path, exported: Path) -> None:
    from tests.retrieval.test_export import policy_logits

    log = ParquetLog.open(run.parents[1] / "test")
    table = log.read_row_group(0).slice(0, 1500)
    part = TableLog(table, log.schema, rows_per_group=400)
    retriever = Retriever.open(exported, index=False)
    ten, hundred = retrieval_quality(retriever, part, (10, 100))
    order = policy_logits(run, table).argsort(dim=1, descending=True, stable=True).numpy()
    action = retriever.numbers_of(table.column("action").to_pylist())
    rank = (order == action[:, None]).argmax(axis=1)
    weight = table.column("reward").to_numpy() / table.column("pscore").to_numpy()
    for found, k in ((ten, 10), (hundred, 100)):
        assert found.recall == pytest.approx(weight @ (rank < k) / weight.sum(), abs=1e-6)
        gain = np.where(rank < k, 1 / np.log2(2.0 + rank), 0.0)
        assert found.ndcg == pytest.approx(weight @ gain / weight.sum(), abs=1e-6)
        assert found.coverage == pytest.approx(len(np.unique(order[:, :k])) / 3000, abs=1e-3)
    with_index = retrieval_quality(Retriever.open(exported), part, (20,))[0]
    assert 0.95 < with_index.index_recall <= 1.0  # type: ignore[operator]


def test_invalid_arguments_raise() -> None:
    columns = {"context": [0], "action": [1], "reward": [0.0], "pscore": [1.0]}
    ranked = Ranked(np.asarray([[0, 1, 2]]))
    for ks in ([4], [0], []):
        with pytest.raises(ConfigError, match=r"must lie in \[1, 3\]"):
            quality(ranked, ks, **columns)
    with pytest.raises(DataError, match="no row with a positive reward"):
        quality(ranked, [1], **columns)
