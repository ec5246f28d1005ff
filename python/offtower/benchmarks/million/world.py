"""Worlds of the million-item benchmark: few rewards, skewed logging, and known expected rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower import ops
from offtower.benchmarks.quality.world import Value
from offtower.data.catalogue import Catalogue
from offtower.data.log import TableLog
from offtower.data.simulate import LoggingPolicy, SimulatedWorld, WorldSettings
from offtower.data.simulate.features import vector_matrix
from offtower.errors import ConfigError
from offtower.prepare import PreparedData, prepare
from offtower.progress import Progress

ID_SHARES: Mapping[str, float] = {"features": 0.0, "ids": 1.0, "both": 0.5}
"""By name: the share of an item's part in rewards that only its id shows."""
WIDTH = 16
"""Dimension of contexts, item vectors and the interaction."""
REWARDED = 0.01
"""Mean reward of the log."""
SKEW = 4.0
"""Inverse temperature of the logging policy over the items' parts of z, whose standard deviation is
about 0.5: the log-frequencies of the items have one of 2."""
CONTEXTS, BASELINE_CONTEXTS = 1000, 64


@dataclass(frozen=True)
class MillionWorld:
    """A world, its log, and fresh contexts for the truth."""

    name: str
    simulated: SimulatedWorld
    log: TableLog
    contexts: pa.Table
    """Fresh rows with the users whose contexts they are."""

    @cached_property
    def data(self) -> PreparedData:
        """The log and the catalogue as trainers read them."""
        catalogue = Catalogue(
            self.simulated.catalogue_table(), self.simulated.catalogue_schema, self.name
        )
        return prepare(self.log, None, catalogue, Progress())

    @cached_property
    def arrays(self) -> Arrays:
        """The log as arrays, for trainers outside of this package."""
        table = self.log.table
        return Arrays(
            context=context_matrix(table),
            action=torch.from_numpy(table["action"].to_numpy().copy()),
            reward=torch.from_numpy(table["reward"].to_numpy().copy()).float(),
            user=table["user_id"].to_numpy().copy(),
            items=self.simulated.n_items,
            users=self.simulated.settings.n_users,
            item=self._item_matrix(),
            has_ids=self.simulated.settings.id_share > 0.0,
        )

    def _item_matrix(self) -> Tensor | None:
        if self.simulated.settings.id_share == 1.0:
            return None
        return _vectors(self.simulated.catalogue_table(), "action_context")

    @cached_property
    def baselines(self) -> dict[str, float]:
        """Exact values of the logging policy and of the best item in each context."""
        some = self.contexts.slice(0, BASELINE_CONTEXTS)
        return {
            "logging": float(self.simulated.logging_rewards(some).mean()),
            "optimum": float(self.simulated.best_rewards(self.contexts).mean()),
        }

    @torch.no_grad()
    def value(self, context: Tensor, item: Tensor, bias: Tensor | None = None) -> Value:
        """Compute the exact values of a softmax policy and of its greedy policy.

        Args:
            context: (n, d) float32 embeddings of `contexts`, divided by the temperature.
            item: (N, d) float32.
            bias: (N,) float32.
        """
        best = ops.top_k(context, item, 1, item_bias=bias)[1][:, 0]
        wide = self.simulated.reward_model(self.contexts)
        assert wide.item_bias is not None
        reward = ops.FactoredReward(
            wide.context.float(), wide.item.float(), wide.item_bias.float(), link="sigmoid"
        )
        terms = ops.policy_terms(context, item, best, item_bias=bias, reward_model=reward)
        assert terms.expected_reward is not None
        greedy = self.simulated.expected_reward(self.contexts, best.numpy())
        return Value(float(terms.expected_reward.double().mean()), float(greedy.mean()))


@dataclass(frozen=True)
class Arrays:
    """A log and its catalogue as arrays."""

    context: Tensor
    """(n, WIDTH) float32."""
    action: Tensor
    """(n,) int64 item numbers."""
    reward: Tensor
    """(n,) float32."""
    user: NDArray[np.int64]
    """(n,) user numbers."""
    items: int
    users: int
    item: Tensor | None
    """(N, WIDTH) float32 item vectors; None where items have ids alone."""
    has_ids: bool
    """Whether the id is a feature."""


def make_world(name: str, items: int, rows: int, seed: int) -> MillionWorld:
    """Simulate a world, a log of `rows` rows and fresh contexts.

    Raises:
        ConfigError: no world has this name.
    """
    if name not in ID_SHARES:
        raise ConfigError(f"unknown world '{name}'; known: {', '.join(ID_SHARES)}")
    settings = WorldSettings(
        WIDTH, WIDTH, WIDTH, n_users=max(100, rows // 20), intercept=0.0, id_share=ID_SHARES[name]
    )
    logging = LoggingPolicy("popularity", beta=SKEW, epsilon=0.1)

    def world(intercept: float) -> SimulatedWorld:
        return SimulatedWorld(
            items, replace(settings, intercept=intercept), seed=seed, logging=logging
        )

    chosen = world(_intercept(world(0.0)))
    log = pa.concat_tables(chosen.log(rows, seed=1))
    contexts = pa.concat_tables(chosen.log(CONTEXTS, seed=2)).combine_chunks()
    return MillionWorld(name, chosen, TableLog(log, chosen.log_schema), contexts)


def _intercept(world: SimulatedWorld) -> float:
    """The intercept at which the mean reward of logged rows is REWARDED, by bisection."""
    rows = pa.concat_tables(world.log(20_000, seed=3))
    latent = world.context_latent(rows)
    action = torch.from_numpy(rows["action"].to_numpy().copy())
    logit = (latent * world.item_latent[action]).sum(1) + world.item_logit[action]
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(torch.sigmoid(logit + middle).mean()) < REWARDED:
            low = middle
        else:
            high = middle
    return low


def context_matrix(table: pa.Table) -> Tensor:
    """(n, WIDTH) float32."""
    return _vectors(table, "context")


def _vectors(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(vector_matrix(table[name].combine_chunks(), WIDTH).copy()).float()
