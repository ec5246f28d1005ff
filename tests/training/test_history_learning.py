"""Learning from logs whose rewards depend on histories, against known expected rewards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.encoding import to_tensors
from offtower.data.simulate import HistorySettings, LoggingPolicy, SimulatedWorld, WorldSettings
from offtower.models.items import ItemFeatures
from offtower.models.store import load_policy
from offtower.training.run import train_run


def world(**settings: Any) -> SimulatedWorld:
    history = HistorySettings(**settings)
    return SimulatedWorld(
        40,
        WorldSettings(4, 4, 4, scale=2.5, intercept=-2.0, history=history),
        seed=5,
        logging=LoggingPolicy("contextual", 0.3, 0.2),
    )


def test_rewards_depend_on_the_history_as_described() -> None:
    one = world(length=6, share=1.0, half_life=2.0)
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
    one = world(length=8, half_life=2.0)
    write_catalogue(tmp_path / "catalogue", one.catalogue_table(), one.catalogue_schema)
    schema = one.log_schema
    write_log(tmp_path / "seen", one.log(20_000, seed=1), schema)
    plain = replace(schema, context=schema.context[:1])
    write_log(tmp_path / "plain", one.log(20_000, seed=1), plain)
    contexts = one.contexts(4000, seed=9)

    def rewards(log: str, encoder: str = "mean") -> NDArray[np.float64]:
        history = {"encoder": encoder, "layers": 1, "width": 16}
        tower = {"hidden_layer_sizes": [32]}
        config = parse_config(
            {
                "name": f"{log}-{encoder}",
                "runs": str(tmp_path / "runs"),
                "data": {
                    "train": str(tmp_path / log),
                    "catalogue": str(tmp_path / "catalogue"),
                },
                "policy": {
                    "embedding_dim": 8,
                    "item_bias": True,
                    "context_tower": {**tower, "history": history},
                    "item_tower": tower,
                },
                "reward_model": {"kind": "factored", "folds": 2, "epochs": 5, "tower": tower},
                "objective": {"name": objective},
                "training": {"epochs": 8, "batch_size": 256, "learning_rate": 5e-3, "threads": 1},
            }
        )
        train_run(config)
        policy, _ = load_policy(config.run_directory / "policy")
        with torch.no_grad():
            items = policy.embed_items(
                ItemFeatures.from_catalogue(one.catalogue(), policy.item_encoding)
            )
        return one.policy_rewards(
            contexts,
            lambda some: policy.embed_contexts(to_tensors(policy.context_encoding.encode(some))),
            items.embedding,
            item_bias=items.bias,
        )

    without = rewards("plain")
    for encoder in ("mean", "transformer"):
        gain = rewards("seen", encoder) - without
        assert gain.mean() > 10 * gain.std() / np.sqrt(len(gain)), encoder
