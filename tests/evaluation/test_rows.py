"""Rows are checked when they are made, with exact messages."""

from __future__ import annotations

import numpy as np
import pytest

from offtower.errors import DataError, OfftowerError
from offtower.evaluation import EvaluationRows


def test_columns_become_float64_and_keys_int64() -> None:
    rows = EvaluationRows(
        np.array([1, 2], np.float32),
        [0, 1],
        user=np.array([2**63 + 5, 1], np.uint64),
        row=np.arange(2, dtype=np.int32),
    )
    assert rows.importance_weight.dtype == rows.reward.dtype == np.float64
    assert rows.user is not None and rows.row is not None
    assert rows.user.dtype == rows.row.dtype == np.int64
    assert len(rows) == rows.n == 2 and rows.action_reward is None


def test_weights_come_from_their_logarithm() -> None:
    rows = EvaluationRows(None, [1.0, 1.0, 1.0], log_weight=[0.0, -745.0, -np.inf])
    assert rows.importance_weight[0] == 1.0
    assert 0.0 < rows.importance_weight[1] < 1e-300 and rows.importance_weight[2] == 0.0


def test_take_keeps_every_column() -> None:
    rows = EvaluationRows(
        [1.0, 2.0, 3.0], [0.0, 1.0, 0.0], [0.1, 0.2, 0.3], [0.5] * 3, [7, 7, 8], [0, 1, 2],
        np.log([1.0, 2.0, 3.0]), [1.0, 1.0, 2.0],
    )  # fmt: skip
    part = rows.take(np.array([2, 0]))
    assert part.n == 2
    assert part.user is not None and part.user.tolist() == [8, 7]
    assert part.cluster_weight is not None and part.cluster_weight.tolist() == [2.0, 1.0]
    assert rows.take(slice(1, 2)).reward.tolist() == [1.0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"importance_weight": [1.0, np.nan]},
            r"importance_weight\[1\] is nan, expected a finite number \(1 such value in 2 rows\)",
        ),
        (
            {"importance_weight": [-1.0, -2.0]},
            r"importance_weight\[0\] is -1.0, expected a number that is not negative \(2 such val",
        ),
        ({"importance_weight": [1.0, np.inf]}, r"importance_weight\[1\] is inf"),
        ({"reward": [np.nan, 0.0]}, r"reward\[0\] is nan"),
        ({"reward": [0.0]}, "reward has 1, importance_weight has 2|reward has 1"),
        ({"reward": None}, "reward is missing"),
        ({"reward": [[1.0, 2.0]]}, r"one dimension \(rows\), but has shape \(1, 2\)"),
        ({"reward": ["a", "b"]}, "reward must be an array of numbers"),
        ({"action_reward": [0.1, np.inf]}, r"action_reward\[1\] is inf"),
        ({"expected_reward": [0.1]}, "expected_reward has 1"),
        ({"cluster_weight": [0.1, -0.1]}, r"cluster_weight\[1\] is -0.1"),
        ({"log_weight": [np.nan, 0.0]}, r"log_weight\[0\] is nan, expected a number"),
        ({"user": ["ann", "bob"]}, "user must be a list of integer keys"),
        ({"row": [0.5, 1.5]}, "row must be a list of integer keys"),
        ({"importance_weight": None}, "importance_weight or log_weight; both are missing"),
        (
            {"importance_weight": None, "log_weight": [0.0, 800.0]},
            r"importance_weight\[1\] is inf",
        ),
    ],
)
def test_malformed_columns_are_refused(columns: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"importance_weight": [1.0, 2.0], "reward": [0.0, 1.0]}
    with pytest.raises(DataError, match=message) as caught:
        EvaluationRows(**{**good, **columns})  # type: ignore[arg-type]
    assert isinstance(caught.value, OfftowerError)
