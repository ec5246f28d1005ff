"""Samples of batches join row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offtower.evaluation.rows import ModelPredictions
from offtower.evaluation.samples import joined


@dataclass(frozen=True)
class Sample:
    row: np.ndarray
    context: np.ndarray | None
    models: dict[str, dict[str, ModelPredictions]]


def sample(*rows: float) -> Sample:
    values = np.array(rows)
    return Sample(values, None, {"a": {"dm": ModelPredictions(2 * values, 3 * values, 5.0)}})


def test_arrays_dictionaries_and_dataclasses_join_in_order() -> None:
    found = joined([sample(1.0, 2.0), sample(3.0), sample(0.0)])
    assert found.row.tolist() == [1.0, 2.0, 3.0, 0.0] and found.context is None
    model = found.models["a"]["dm"]
    assert model.action_reward.tolist() == [2.0, 4.0, 6.0, 0.0]
    assert model.expected_reward.tolist() == [3.0, 6.0, 9.0, 0.0] and model.parameters == 5.0
