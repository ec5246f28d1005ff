"""A simulated recommender whose every probability is known, up to a million items.

Expected rewards are factored, so that no array of rounds x items ever exists:

    z(x, a) = scale <A s(x), B s(a)> / sqrt(latent_dim) + popularity <w, s(a)> + intercept
    q(x, a) = sigmoid(z(x, a))
    pi_0(a|x) = (1 - epsilon) softmax_a(beta z(x, a)) + epsilon / N

with states s(x), s(a) that the features of contexts and items determine (`features.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower import ops
from offtower.data.catalogue import Catalogue
from offtower.data.eligible import eligible_items
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.simulate.clicks import SlateSettings, draw_rewards
from offtower.data.simulate.drift import MIDDLE
from offtower.data.simulate.eligible_sets import (
    PERIOD_DAYS,
    START,
    EligibilitySettings,
    EligibleSets,
)
from offtower.data.simulate.features import CONTEXT_NAMES, ITEM_NAMES, Side
from offtower.data.simulate.histories import Histories
from offtower.data.simulate.logging_policy import LoggingPolicy
from offtower.data.simulate.policy_values import PolicyValues
from offtower.data.simulate.rounds import draw_rounds
from offtower.data.simulate.world_settings import WorldSettings
from offtower.errors import ConfigError

_PARAMETERS, _ITEMS, _LOG, _CONTEXTS, _ELIGIBLE, _IDS, _DRIFT = 1, 2, 3, 4, 5, 6, 7
_HISTORIES = 8
"""Purposes of random streams, part of their keys."""

CHUNK_ROWS = 4096
"""Rows drawn at a time. Another value draws other rows from the same seed."""


@dataclass(frozen=True)
class HiddenParts:
    """The distribution of z's item parts given the features, where ids have parts of their own.

    Attributes:
        latent: (N, latent_dim) float64 means of the item factors.
        logit: (N,) float64 means of the items' parts.
        latent_size: (latent_dim,) standard deviations around the means.
        logit_size: that of the items' parts.
    """

    latent: Tensor
    logit: Tensor
    latent_size: Tensor
    logit_size: float


class SimulatedWorld(PolicyValues):
    """Contexts, items, rewards and a logging policy with known probabilities.

    Args:
        n_items: N, up to millions.
        settings: sizes, rewards and data.
        seed: of the world; logs and contexts are drawn from it with seeds of their own.
        logging: pi_0 of the logs. Kind "popularity" ignores the context, so that a draw costs
            O(log N) instead of O(N).
        slate: size and rewards of slates; without it, rounds have one item.
        eligible: which items may be shown; without it, every item may.

    Raises:
        ConfigError: there are fewer items than a slate has.
    """

    def __init__(
        self,
        n_items: int,
        settings: WorldSettings = WorldSettings(),
        *,
        seed: int = 0,
        logging: LoggingPolicy = LoggingPolicy(),
        slate: SlateSettings | None = None,
        eligible: EligibilitySettings | None = None,
    ) -> None:
        least = 1 if slate is None else slate.size
        if n_items < least:
            raise ConfigError(f"n_items must be at least {least}, but is {n_items}")
        self.n_items = n_items
        self.settings = settings
        self.seed = seed
        self.logging_policy = logging
        self.slate = slate
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
        self.hidden: HiddenParts | None = None
        if settings.id_share > 0.0:
            sizes = np.linalg.norm(item_map, axis=1), float(np.linalg.norm(taste))
            self._hide(sizes, _generator(seed, _IDS))
        self._histories: Histories | None = None
        if settings.history is not None:
            self._histories = Histories(
                settings.history,
                self.item_ids,
                self.item_latent.numpy(),
                settings.scale,
                _generator(seed, _HISTORIES),
            )
        self.eligible: EligibleSets | None = None
        if eligible is not None:
            popularity, rng = self.item_logit.numpy(), _generator(seed, _ELIGIBLE)
            self.eligible = EligibleSets(eligible, self.item_ids, popularity, least, rng)
        self.drift_direction: Tensor | None = None
        """(N,) float64: d(a) of `DriftSettings`; None without drift."""
        if settings.drift is not None:
            if slate is not None or eligible is not None:
                raise ConfigError("drift has no form for slates or eligible items")
            direction = _generator(seed, _DRIFT).standard_normal(n_items) - 1.0
            self.drift_direction = torch.from_numpy(direction)

    def at(self, time: np.datetime64) -> SimulatedWorld:
        """The world with the rewards of one time, for true values; itself without drift.

        Its logging policy follows those rewards: that of the logs is this world's.
        """
        if self.settings.drift is None or self.drift_direction is None:
            return self
        there = copy.copy(self)
        amount = float(self.settings.drift.amount(np.array([time]))[0])
        there.item_logit = self.item_logit + amount * self.drift_direction
        return there

    def _hide(self, sizes: tuple[NDArray[np.float64], float], rng: np.random.Generator) -> None:
        """Replace a share of z's item parts by draws that no feature shows.

        sizes: standard deviations of the factor's coordinates and of the item's part.
        """
        share = self.settings.id_share
        intercept, seen = self.settings.intercept, np.sqrt(1.0 - share)
        latent_size, logit_size = np.sqrt(share) * sizes[0], np.sqrt(share) * sizes[1]
        latent = seen * self.item_latent
        logit = seen * (self.item_logit - intercept) + intercept
        self.hidden = HiddenParts(latent, logit, torch.from_numpy(latent_size), logit_size)
        drawn = rng.standard_normal((self.n_items, len(latent_size)))
        self.item_latent = latent + torch.from_numpy(drawn * latent_size)
        self.item_logit = logit + torch.from_numpy(logit_size * rng.standard_normal(self.n_items))

    @property
    def slate_size(self) -> int:
        """Items of a round."""
        return 1 if self.slate is None else self.slate.size

    @property
    def item_ids(self) -> pa.Array:
        """(N,) item ids in the order of the catalogue."""
        return self._ids_of(np.arange(self.n_items))

    @property
    def catalogue_schema(self) -> CatalogueSchema:
        features = self._item_side.specs if self.settings.id_share < 1.0 else ()
        if self.settings.id_share > 0.0 or self._histories is not None:
            features += (FeatureSpec(name="id", kind="category", column="item_id"),)
        schema = CatalogueSchema(item_id="item_id", features=features)
        return schema if self.eligible is None else schema.keeping(self.eligible.section)

    @property
    def log_schema(self) -> LogSchema:
        return LogSchema(
            context=self._context_side.specs
            + (() if self._histories is None else (self._histories.spec,)),
            action="action",
            reward="reward",
            pscore="pscore",
            timestamp="timestamp",
            behavior_policy="behavior_policy",
            position=None if self.slate is None else "position",
            pscore_kind=None if self.slate is None else "conditional",
            round_id=None if self.slate is None else "round_id",
            user_id="user_id",
            reward_range=(0.0, 1.0),
            eligible=None if self.eligible is None else self.eligible.section,
        )

    def catalogue_table(self) -> pa.Table:
        """Return one row per item: `item_id` and the feature columns."""
        columns = {"item_id": self.item_ids}
        if self.settings.id_share < 1.0:
            columns |= self._item_columns
        if self.eligible is not None:
            columns |= self.eligible.item_columns()
        return pa.table(columns)

    def eligibility(self, contexts: pa.Table) -> ops.Eligibility | None:
        items = eligible_items(self._catalogue, self.log_schema)
        return None if items is None else items.encode(contexts).on()

    @cached_property
    def _catalogue(self) -> Catalogue:
        return self.catalogue()

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
            n_rounds: rounds in all, each with one row for every item of its slate.
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
        if self.slate is not None or self.eligible is not None:
            return self._rounds_chunk(number, n_rounds, seed, policy, behavior_policy)
        first, count, rng = self._chunk(number, n_rounds, _LOG, seed)
        time = self._times(first, count, n_rounds)
        columns, users = self._draw_contexts(time, rng)
        latent = self.context_latent(pa.table(columns))
        action, pscore = self._draw_actions(policy, latent, time, rng)
        logit, drift = self._logit(latent, action), self.settings.drift
        if drift is not None and self.drift_direction is not None:
            logit = logit + torch.from_numpy(drift.amount(time)) * self.drift_direction[action]
        mean = torch.sigmoid(logit).numpy()
        reward = draw_rewards(mean, self.settings.reward, rng).astype(np.float32)
        return pa.table(
            {
                **columns,
                "action": self._ids_of(action.numpy()),
                "reward": pa.array(reward),
                "pscore": pa.array(pscore.numpy()),
                "timestamp": pa.array(time),
                "behavior_policy": pa.repeat(behavior_policy, count),
                "user_id": pa.array(users),
            }
        )

    def _draw_actions(
        self,
        policy: LoggingPolicy,
        latent: Tensor,
        time: NDArray[np.datetime64],
        rng: np.random.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Items and their probabilities; rows are in the order of time."""
        drift, items = self.settings.drift, (self.item_latent, self.item_logit)
        if drift is None or drift.logging == 1.0:
            return policy.draw(latent, *items, rng)
        cut = int(np.searchsorted(time, MIDDLE))
        early = policy.draw(latent[:cut], *items, rng)
        late = drift.late(policy).draw(latent[cut:], *items, rng)
        return torch.cat([early[0], late[0]]), torch.cat([early[1], late[1]])

    def _rounds_chunk(
        self, number: int, n_rounds: int, seed: int, policy: LoggingPolicy, behavior_policy: str
    ) -> pa.Table:
        """`log_chunk` of a world with slates or eligible items."""
        first, count, rng = self._chunk(number, n_rounds, _LOG, seed)
        time = self._times(first, count, n_rounds)
        columns, users = self._draw_contexts(time, rng)
        columns["timestamp"] = pa.array(time)
        if self.eligible is not None:
            draws = _generator(self.seed, _ELIGIBLE, _LOG, seed, number)
            columns |= self.eligible.row_columns(time, draws)
        contexts = pa.table(columns)
        size = self.slate_size
        slate, log_prob = draw_rounds(self, policy, contexts, size, rng)
        reward = self.draw_slate_rewards(contexts, slate, rng)
        row = pa.array(np.repeat(np.arange(count), size))
        shown = {
            "action": self._ids_of(slate.reshape(-1)),
            "reward": pa.array(reward.reshape(-1).astype(np.float32)),
            "pscore": pa.array(np.exp(log_prob.reshape(-1))),
            "behavior_policy": pa.repeat(behavior_policy, count * size),
            "user_id": pa.array(np.repeat(users, size)),
        }
        if self.slate is not None:
            name = np.char.mod(f"{behavior_policy}-{seed}-%d", np.arange(first, first + count))
            shown["round_id"] = pa.array(name).take(row)
            shown["position"] = pa.array(np.tile(np.arange(size), count))
        return _with_columns(contexts.take(row), shown)

    def slate_rewards(self, contexts: pa.Table, slate: NDArray[np.int64]) -> NDArray[np.float64]:
        """Compute the expected reward of each position of given slates.

        Args:
            contexts: n rows.
            slate: (n, K) item numbers, in order.

        Returns:
            (n, K).
        """
        logit = self._slate_logit(contexts, slate)
        return self._slate_settings.expected_rewards(logit, self.settings.intercept)

    @property
    def _slate_settings(self) -> SlateSettings:
        return self.slate or SlateSettings(1, "independent")

    def _slate_logit(self, contexts: pa.Table, slate: NDArray[np.int64]) -> NDArray[np.float64]:
        latent, item = self.context_latent(contexts), torch.from_numpy(slate)
        logit = torch.einsum("bl,bkl->bk", latent, self.item_latent[item]) + self.item_logit[item]
        values: NDArray[np.float64] = logit.numpy()
        return values

    def draw_slate_rewards(
        self, contexts: pa.Table, slate: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Draw the rewards (n, K) of given slates; the arguments are those of `slate_rewards`."""
        logit = self._slate_logit(contexts, slate)
        kind = self.settings.reward
        return self._slate_settings.draw(logit, self.settings.intercept, kind, rng)

    def contexts(self, n: int, seed: int = 0) -> pa.Table:
        """Draw n new contexts: the context columns, those that say which items are eligible, and
        with histories the time before which they end."""
        tables = []
        for number in range(num_chunks(n)):
            first, count, rng = self._chunk(number, n, _CONTEXTS, seed)
            time = self._times(first, count, n)
            columns = self._draw_contexts(time, rng)[0]
            if self.eligible is not None or self._histories is not None:
                columns["timestamp"] = pa.array(time)
            if self.eligible is not None:
                draws = _generator(self.seed, _ELIGIBLE, _CONTEXTS, seed, number)
                columns |= self.eligible.row_columns(time, draws)
            tables.append(pa.table(columns))
        return pa.concat_tables(tables).combine_chunks()

    def context_latent(self, contexts: pa.Table) -> Tensor:
        """Return z's context factor, (B, latent_dim) float64, scale included."""
        factor = self._context_side.state(contexts) @ self._context_map.T
        if self._histories is not None:
            share = self._histories.settings.share
            factor *= np.sqrt(1.0 - share)
            factor += np.sqrt(share) * self._histories.factor(contexts)
        return torch.from_numpy(factor)

    def _chunk(
        self, number: int, n: int, purpose: int, seed: int
    ) -> tuple[int, int, np.random.Generator]:
        first = number * CHUNK_ROWS
        return first, min(CHUNK_ROWS, n - first), _generator(self.seed, purpose, seed, number)

    def _times(self, first: int, count: int, n_rounds: int) -> NDArray[np.datetime64]:
        """(count,) times of rounds: a second apart, or spread over the period in which items come
        and go, or over the weeks of drift."""
        if self.settings.drift is not None:
            return self.settings.drift.times(first, count, n_rounds)
        number = np.arange(first, first + count)
        if self.eligible is None or self.eligible.settings.days is None:
            return START + number.astype("timedelta64[s]")
        period = PERIOD_DAYS * 86_400_000_000
        return START + (number * (period / n_rounds)).astype("timedelta64[us]")

    def _ids_of(self, number: NDArray[np.int64]) -> pa.Array:
        return pa.array(np.char.mod("item-%d", number) if self.settings.string_ids else number)

    def _draw_contexts(
        self, time: NDArray[np.datetime64], rng: np.random.Generator
    ) -> tuple[dict[str, pa.Array], NDArray[np.int64]]:
        """Columns and users of contexts at these times."""
        n = len(time)
        users = rng.integers(self.settings.n_users, size=n)
        own = rng.standard_normal((n, self.settings.dim_context), dtype=np.float32)
        vectors = np.float32(np.sqrt(0.5)) * (self._user_vectors[users] + own)
        columns = self._context_side.columns(vectors, rng)
        if self._histories is not None:
            columns |= self._histories.columns(time, rng)
        return columns, users


def _with_columns(table: pa.Table, columns: dict[str, pa.Array]) -> pa.Table:
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


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
