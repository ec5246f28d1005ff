"""Logs of `SimulatedWorld` for the quality suite."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import Tensor

from offtower.benchmarks.quality.world import QualityWorld, Truth
from offtower.data.log import TableLog
from offtower.data.simulate import LoggingPolicy, SimulatedWorld

TEST_CONTEXTS = 1_000


def simulated(items: int, rounds: int, seed: int) -> QualityWorld:
    """Return a world with logistic rewards in vectors, logged by a softmax over all items."""
    world = SimulatedWorld(items, seed=seed, logging=LoggingPolicy(beta=2.0))
    log = TableLog(pa.concat_tables(world.log(rounds, seed=seed)), world.log_schema)
    contexts = world.contexts(TEST_CONTEXTS, seed=seed)
    latent = world.context_latent(contexts)

    def expected(start: int, stop: int) -> Tensor:
        return torch.sigmoid(latent[start:stop] @ world.item_latent.T + world.item_logit)

    return QualityWorld(
        name=f"simulated {items} items, n {rounds}",
        log=log,
        catalogue=world.catalogue(),
        truth=Truth(contexts, expected),
        baselines={
            "logging": float(world.logging_rewards(contexts).mean()),
            "best_fixed": world.best_fixed_item(500, seed).value,
            "optimum": float(world.best_rewards(contexts).mean()),
        },
    )
