"""Learning from logs whose rewards depend on histories, against known expected rewards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from benchmarks.histories import Task, history_world

from offtower.data.simulate import HistorySettings, SimulatedWorld, WorldSettings


def test_rewards_depend_on_the_history_as_described() -> None:
    one = history_world(HistorySettings(6, 1.0, 2.0))
    table = pa.concat_tables(one.log(300, seed=1))
    contexts = table.slice(0, 50)
    item, rows = one.item_latent.numpy(), contexts.to_pylist()
    standard = (item - item.mean(axis=0)) / item.std(axis=0)
    sums = np.zeros((50, 4))
    for number, row in enumerate(rows):
        assert row["history_times"] == sorted(row["history_times"])
        assert all(time < row["timestamp"] for time in row["history_times"])
        weights = [0.5 ** (k / 2.0) for k in range(len(row["history"]))][::-1]
        for seen, weight in zip(row["history"], weights, strict=True):
            sums[number] += weight * standard[seen] / np.linalg.norm(weights)
    # The factor is one linear map of these sums.
    found = one.context_latent(contexts).numpy()
    solved, *_ = np.linalg.lstsq(sums, found, rcond=None)
    np.testing.assert_allclose(sums @ solved, found, atol=1e-12)
    assert np.abs(found).max() > 0.5
    # The part of the features is unchanged by the histories, and other worlds are as before.
    plain = SimulatedWorld(40, WorldSettings(4, 4, 4, scale=2.5, intercept=-2.0), seed=5)
    assert plain.contexts(3).column_names == ["context"]
    np.testing.assert_array_equal(plain.item_latent, one.item_latent)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["weighted_likelihood", "dr"])
def test_a_tower_that_reads_histories_is_better(tmp_path: Path, objective: str) -> None:
    """Its value is above that of the same towers without them, by ten standard errors."""
    task = Task(history_world(HistorySettings(length=8)), tmp_path)
    task.write()
    without = task.rewards(objective, "none")
    for encoder in ("mean", "transformer"):
        gain = task.rewards(objective, encoder) - without
        assert gain.mean() > 10 * gain.std() / np.sqrt(len(gain)), encoder
