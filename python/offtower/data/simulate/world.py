"""A simulated recommender whose every probability is known, up to a million items.

Expected rewards are factored, so that no array of rounds x items ever exists:

    z(x, a) = scale <A s(x), B s(a)> / sqrt(latent_dim) + popularity <w, s(a)> + intercept
    q(x, a) = sigmoid(z(x, a))
    pi_0(a|x) = (1 - epsilon) softmax_a(beta z(x, a)) + epsilon / N

with states s(x), s(a) that the features of contexts and items determine (`features.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower.data.catalogue import Catalogue
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.data.simulate.features import CONTEXT_NAMES, ITEM_NAMES, FeatureKinds, Side
from offtower.data.simulate.logging_policy import LoggingPolicy
from offtower.data.simulate.policy_values import PolicyValues
from offtower.errors import ConfigError

RewardKind = Literal["binary", "continuous"]

_PARAMETERS, _ITEMS, _LOG, _CONTEXTS = 1, 2, 3, 4
"""Purposes of random streams, part of their keys."""

CHUNK_ROWS = 4096
"""Rows drawn at a time. Another value draws other rows from the same seed."""

_START = np.datetime64("2026-01-01T00:00:00", "us")
_BETA_CONCENTRATION = 4.0


@dataclass(frozen=True)
class WorldSettings:
    """Sizes, rewards and data of a simulated world.

    Attributes:
        dim_context: dimension of the context vector.
        dim_item: dimension of the item vector.
        latent_dim: rank of the interaction between contexts and items.
        reward: "binary" draws Bernoulli(q); "continuous" draws Beta(4q, 4(1-q)), mean q.
        scale: standard deviation of the interaction in z.
        popularity: standard deviation of the item's own part of z.
        intercept: z of an average item in an average context.
        n_users: different users; a user's contexts share half of their variance.
        feature_kinds: "vector" or "all" (see `features.py`).
        string_ids: item ids are strings.

    Raises:
        ConfigError: a setting is out of its range.
    """

    dim_context: int = 8
    dim_item: int = 8
    latent_dim: int = 8
    reward: RewardKind = "binary"
    scale: float = 1.5
    popularity: float = 0.5
    intercept: float = -1.5
    n_users: int = 10_000
    feature_kinds: FeatureKinds = "vector"
    string_ids: bool = False

    def __post_init__(self) -> None:
        for name in ("dim_context", "dim_item", "latent_dim", "n_users"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, but is {getattr(self, name)}")
        if self.reward not in get_args(RewardKind):
            raise ConfigError(f"reward must be 'binary' or 'continuous', but is {self.reward!r}")
        if self.feature_kinds not in get_args(FeatureKinds):
            raise ConfigError(
                f"feature_kinds must be 'vector' or 'all', but is {self.feature_kinds!r}"
            )


class SimulatedWorld(PolicyValues):
    """Contexts, items, rewards and a logging policy with known probabilities.

    Args:
        n_items: N, up to millions.
        settings: sizes, rewards and data.
        seed: of the world; logs and contexts are drawn from it with seeds of their own.
        logging: pi_0 of the logs. Kind "popularity" ignores the context, so that a draw costs
            O(log N) instead of O(N).

    Raises:
        ConfigError: there is no item.
    """

    def __init__(
        self,
        n_items: int,
        settings: WorldSettings = WorldSettings(),
        *,
        seed: int = 0,
        logging: LoggingPolicy = LoggingPolicy(),
    ) -> None:
        if n_items < 1:
            raise ConfigError(f"n_items must be at least 1, but is {n_items}")
        self.n_items = n_items
        self.settings = settings
        self.seed = seed
        self.logging_policy = logging
        dim_context, dim_item = settings.dim_context, settings.dim_item
        rng = _generator(seed, _PARAMETERS)
        self._context_side = Side(CONTEXT_NAMES, dim_context, settings.feature_kinds, rng)
        self._item_side = Side(ITEM_NAMES, dim_item, settings.feature_kinds, rng)
        latent_dim = settings.latent_dim
        size = settings.scale / np.sqrt(latent_dim)
        self._context_map = size * rng.standard_normal((latent_dim, dim_context))
        self._context_map /= np.sqrt(dim_context)
        item_map = rng.standard_normal((latent_dim, dim_item)) / np.sqrt(dim_item)
        taste = settings.popularity * rng.standard_normal(dim_item) / np.sqrt(dim_item)
        self._user_vectors = rng.standard_normal((settings.n_users, dim_context)).astype(np.float32)
        rng = _generator(seed, _ITEMS)
        vectors = rng.standard_normal((n_items, dim_item), dtype=np.float32)
        self._item_columns = self._item_side.columns(vectors, rng)
        item_state = self._item_side.state(pa.table(self._item_columns))
        self.item_latent = torch.from_numpy(item_state @ item_map.T)
        """(N, latent_dim) float64: z's item factor."""
        self.item_logit = torch.from_numpy(item_state @ taste + settings.intercept)
        """(N,) float64: z's item part."""

    @property
    def item_ids(self) -> pa.Array:
        """(N,) item ids in the order of the catalogue."""
        return self._ids_of(np.arange(self.n_items))

    @property
    def catalogue_schema(self) -> CatalogueSchema:
        return CatalogueSchema(item_id="item_id", features=self._item_side.specs)

    @property
    def log_schema(self) -> LogSchema:
        return LogSchema(
            context=self._context_side.specs,
            action="action",
            reward="reward",
            pscore="pscore",
            timestamp="timestamp",
            behavior_policy="behavior_policy",
            user_id="user_id",
            reward_range=(0.0, 1.0),
        )

    def catalogue_table(self) -> pa.Table:
        """Return one row per item: `item_id` and the feature columns."""
        return pa.table({"item_id": self.item_ids, **self._item_columns})

    def catalogue(self) -> Catalogue:
        """Return the items with their features."""
        return Catalogue.from_table(self.catalogue_table(), self.catalogue_schema)

    def log(
        self,
        n_rounds: int,
        seed: int = 0,
        *,
        policy: LoggingPolicy | None = None,
        behavior_policy: str = "logging",
    ) -> Iterator[pa.Table]:
        """Draw a log, in tables of a few thousand rows with the columns of `log_schema`.

        `pscore` is exact (float64). The same arguments give the same rows. With a contextual
        logging policy each row costs O(N).

        Args:
            n_rounds: rows in all.
            seed: of this log.
            policy: instead of the world's, for a second behavior policy.
            behavior_policy: name written to that column.
        """
        for number in range(num_chunks(n_rounds)):
            yield self.log_chunk(
                number, n_rounds, seed, policy=policy, behavior_policy=behavior_policy
            )

    def log_chunk(
        self,
        number: int,
        n_rounds: int,
        seed: int = 0,
        *,
        policy: LoggingPolicy | None = None,
        behavior_policy: str = "logging",
    ) -> pa.Table:
        """Draw table `number` of `log` with the same arguments, without the others."""
        policy = policy or self.logging_policy
        first, count, rng = self._chunk(number, n_rounds, _LOG, seed)
        columns, users = self._draw_contexts(count, rng)
        latent = self.context_latent(pa.table(columns))
        action, pscore = policy.draw(latent, self.item_latent, self.item_logit, rng)
        mean = torch.sigmoid(self._logit(latent, action)).numpy()
        if self.settings.reward == "binary":
            reward = (rng.random(count) < mean).astype(np.float32)
        else:
            # Beta needs positive parameters; q within 1e-12 of 0 or 1 is that far off.
            safe = np.clip(mean, 1e-12, 1.0 - 1e-12)
            reward = rng.beta(_BETA_CONCENTRATION * safe, _BETA_CONCENTRATION * (1.0 - safe))
            reward = reward.astype(np.float32)
        seconds = np.arange(first, first + count).astype("timedelta64[s]")
        return pa.table(
            {
                **columns,
                "action": self._ids_of(action.numpy()),
                "reward": pa.array(reward),
                "pscore": pa.array(pscore.numpy()),
                "timestamp": pa.array(_START + seconds),
                "behavior_policy": pa.repeat(behavior_policy, count),
                "user_id": pa.array(users),
            }
        )

    def contexts(self, n: int, seed: int = 0) -> pa.Table:
        """Draw n new contexts: a table of the context columns."""
        chunks = (self._chunk(number, n, _CONTEXTS, seed) for number in range(num_chunks(n)))
        tables = [pa.table(self._draw_contexts(count, rng)[0]) for _, count, rng in chunks]
        return pa.concat_tables(tables).combine_chunks()

    def context_latent(self, contexts: pa.Table) -> Tensor:
        """Return z's context factor, (B, latent_dim) float64, scale included."""
        return torch.from_numpy(self._context_side.state(contexts) @ self._context_map.T)

    def _chunk(
        self, number: int, n: int, purpose: int, seed: int
    ) -> tuple[int, int, np.random.Generator]:
        first = number * CHUNK_ROWS
        return first, min(CHUNK_ROWS, n - first), _generator(self.seed, purpose, seed, number)

    def _ids_of(self, number: NDArray[np.int64]) -> pa.Array:
        return pa.array(np.char.mod("item-%d", number) if self.settings.string_ids else number)

    def _draw_contexts(
        self, n: int, rng: np.random.Generator
    ) -> tuple[dict[str, pa.Array], NDArray[np.int64]]:
        users = rng.integers(self.settings.n_users, size=n)
        own = rng.standard_normal((n, self.settings.dim_context), dtype=np.float32)
        vectors = np.float32(np.sqrt(0.5)) * (self._user_vectors[users] + own)
        return self._context_side.columns(vectors, rng), users


def num_chunks(n_rounds: int) -> int:
    """Count the tables of `SimulatedWorld.log`.

    Raises:
        ConfigError: there is no row.
    """
    if n_rounds < 1:
        raise ConfigError(f"the number of rows must be at least 1, but is {n_rounds}")
    return -(-n_rounds // CHUNK_ROWS)


def _generator(seed: int, *purpose: int) -> np.random.Generator:
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=purpose)
    return np.random.Generator(np.random.Philox(sequence))
