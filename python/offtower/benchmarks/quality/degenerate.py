"""Small worlds in which learning from a log goes wrong: few rows, nothing to learn, a log that is
better than anything that can be learned from it.

In all of them propensities are exact and rewards do not depend on the position or on other rounds.
Logs with other faults (rewards confounded by the position, wrong propensities) are outside of what
any rule can correct; `offtower validate` looks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower.benchmarks.quality.world import QualityWorld, Truth
from offtower.data.catalogue import Catalogue
from offtower.data.convert import from_bandit_feedback
from offtower.data.log import TableLog
from offtower.data.schema import CatalogueSchema, FeatureSpec
from offtower.data.simulate.features import vector_array
from offtower.errors import ConfigError
from offtower.seeds import derive_seed

Array = NDArray[np.float64]

_TEST_CELLS = 5_000_000
_TEST_CONTEXTS = 2_000


@dataclass(frozen=True)
class DegenerateWorld:
    """A world: z(x, a) is bilinear in a context and an item vector, standardized to sd 1.

    Attributes:
        logging: inverse temperature of the logging policy softmax(logging x z); 0 is uniform,
            negative ones prefer bad items.
        popularity: standard deviation of a random logit of each item in the logging policy.
        rewards: binary with probability sigmoid(slope z + intercept); cost: that less 1; normal
            with mean slope z + intercept and deviation 1; lognormal with mean exp(that); constant.
        features: what the learner sees. all; half: every other number of contexts and items, the
            logging policy uses all; ids: contexts and item ids; noise: vectors unrelated to z.
        curved: z is the sine of thrice the bilinear form.
        users: number of users, whose activity follows Zipf's law; each has its own random effect
            on the logit of the reward. 0: rows are independent.
        contexts: number of distinct contexts of the log; 0: every row has its own.
    """

    rounds: int = 1_000
    items: int = 10
    logging: float = 1.0
    popularity: float = 0.0
    rewards: Literal["binary", "cost", "normal", "lognormal", "constant"] = "binary"
    slope: float = 2.0
    intercept: float = 0.0
    features: Literal["all", "half", "ids", "noise"] = "all"
    curved: bool = False
    users: int = 0
    contexts: int = 0
    dim: int = 5


_PLAIN = DegenerateWorld()
_IDS = replace(_PLAIN, features="ids", items=400, rounds=300)
_RARE = replace(_PLAIN, intercept=-6.0, rounds=2_000)
_MANY = replace(_PLAIN, items=500, rounds=400)

WORLDS: Mapping[str, DegenerateWorld] = {
    "fifty rows": replace(_PLAIN, rounds=50),
    "fifty rows, good log": replace(_PLAIN, rounds=50, logging=4.0),
    "fifty rows, 200 items": replace(_PLAIN, rounds=50, items=200),
    "one item": replace(_PLAIN, items=1, rounds=200),
    "two items": replace(_PLAIN, items=2, rounds=200),
    "two items, good log": replace(_PLAIN, items=2, rounds=200, logging=6.0),
    "reward always 1": replace(_PLAIN, rewards="constant", intercept=1.0, rounds=500),
    "reward always 0": replace(_PLAIN, rewards="constant", rounds=500),
    "coin flips": replace(_PLAIN, slope=0.0, rounds=500),
    "coin flips, sharp log": replace(_PLAIN, slope=0.0, rounds=500, logging=6.0),
    "coin flips, 400 ids": replace(_IDS, slope=0.0, logging=2.0),
    "rare rewards": _RARE,
    "rare rewards, good log": replace(_RARE, logging=4.0),
    "rare rewards, 200 ids": replace(_RARE, features="ids", items=200),
    "normal rewards": replace(_PLAIN, rewards="normal", intercept=-2.0, rounds=300),
    "normal rewards, good log": replace(
        _PLAIN, rewards="normal", intercept=-2.0, rounds=300, logging=5.0
    ),
    "costs": replace(_PLAIN, rewards="cost", rounds=500, logging=2.0),
    "lognormal rewards": replace(_PLAIN, rewards="lognormal", slope=1.0, logging=2.0),
    "good log": replace(_PLAIN, logging=4.0),
    "deterministic log": replace(_PLAIN, logging=40.0),
    "bad log": replace(_PLAIN, logging=-3.0, rounds=500),
    "bad deterministic log": replace(_PLAIN, logging=-30.0, rounds=500),
    "uniform log": replace(_PLAIN, logging=0.0, rounds=500),
    "1,500 ids, near-optimal log": replace(
        _IDS, logging=20.0, intercept=-1.5, items=1_500, rounds=1_000
    ),
    "400 ids, near-optimal log": replace(_IDS, logging=20.0, intercept=-1.5),
    "400 ids, good log": replace(_IDS, logging=4.0),
    "400 ids, uniform log": replace(_IDS, logging=0.0),
    "60 ids, good log": replace(_IDS, items=60, rounds=1_000, logging=4.0),
    "500 items": _MANY,
    "500 items, good log": replace(_MANY, logging=6.0),
    "500 items, uniform log": replace(_MANY, logging=0.0),
    "lopsided popularity": replace(_PLAIN, items=100, popularity=2.5),
    "lopsided popularity, good log": replace(_PLAIN, items=100, popularity=2.5, logging=4.0),
    "heavy users": replace(_PLAIN, users=40),
    "heavy users, good log": replace(_PLAIN, users=40, logging=4.0),
    "twenty contexts": replace(_PLAIN, contexts=20),
    "twenty contexts, good log": replace(_PLAIN, contexts=20, logging=4.0),
    "half of the features": replace(_PLAIN, features="half", items=50),
    "half of the features, good log": replace(_PLAIN, features="half", items=50, logging=4.0),
    "features of noise, good log": replace(_PLAIN, features="noise", items=50, logging=4.0),
    "curved": replace(_PLAIN, curved=True, items=50),
    "curved, good log": replace(_PLAIN, curved=True, items=50, logging=4.0),
}


class _Drawn:
    """Coefficients of a world."""

    def __init__(self, settings: DegenerateWorld, rng: np.random.Generator) -> None:
        dim = settings.dim
        self.settings = settings
        self.items: Array = rng.standard_normal((settings.items, dim))
        self._context, self._item = rng.standard_normal(dim), rng.standard_normal(dim)
        self._both = rng.standard_normal((dim, dim))
        self._popularity = settings.popularity * rng.standard_normal(settings.items)
        score = self._score(rng.standard_normal((4_000, dim)))
        self._mean, self._deviation = float(score.mean()), max(float(score.std()), 1e-9)

    def _score(self, context: Array) -> Array:
        items = self.items
        linear = (context @ self._context)[:, None] + items @ self._item
        score: Array = linear + context @ self._both @ items.T
        return np.sin(score * 3.0 / self.settings.dim) if self.settings.curved else score

    def z(self, context: Array) -> Array:
        """(n, N) standardized scores."""
        result: Array = (self._score(context) - self._mean) / self._deviation
        return result

    def expected(self, z: Array, effect: Array | float = 0.0) -> Array:
        """(n, N) expected rewards; `effect` (n, 1) shifts the logit."""
        settings = self.settings
        level = settings.slope * z + settings.intercept + effect
        if settings.rewards == "normal":
            return level
        if settings.rewards == "lognormal":
            return np.exp(level)
        if settings.rewards == "constant":
            return np.full_like(z, settings.intercept)
        chance: Array = 1.0 / (1.0 + np.exp(-level))
        return chance - 1.0 if settings.rewards == "cost" else chance

    def reward(self, expected: Array, rng: np.random.Generator) -> Array:
        """(n,) drawn rewards."""
        kind = self.settings.rewards
        if kind == "constant":
            return expected
        if kind == "normal":
            return expected + rng.standard_normal(len(expected))
        if kind == "lognormal":
            return expected * np.exp(rng.standard_normal(len(expected)) - 0.5)
        shift = 1.0 if kind == "cost" else 0.0
        drawn: Array = (rng.random(len(expected)) < expected + shift).astype(np.float64) - shift
        return drawn

    def logging(self, z: Array) -> Array:
        """(n, N) probabilities."""
        logit = self.settings.logging * z + self._popularity
        weight = np.exp(logit - logit.max(axis=1, keepdims=True))
        result: Array = weight / weight.sum(axis=1, keepdims=True)
        return result


def degenerate(name: str, seed: int) -> QualityWorld:
    """Return one of `WORLDS` with its log, drawn from `seed`.

    Raises:
        ConfigError: no world has this name.
    """
    if name not in WORLDS:
        raise ConfigError(f"unknown degenerate world '{name}'; known: {'; '.join(WORLDS)}")
    settings = WORLDS[name]
    rng = np.random.default_rng(derive_seed(seed, f"degenerate {name}"))
    drawn = _Drawn(settings, rng)
    rounds = settings.rounds
    context = rng.standard_normal((settings.contexts or rounds, settings.dim))
    if settings.contexts:
        context = context[rng.integers(0, settings.contexts, rounds)]
    user, effect = _users(settings, rng)
    z = drawn.z(context)
    logging = drawn.logging(z)
    action = (logging.cumsum(axis=1) < rng.random((rounds, 1))).sum(axis=1)
    action = action.clip(max=settings.items - 1)
    row = np.arange(rounds)
    expected = drawn.expected(z, effect)[row, action]
    seen = _Seen(settings, rng)
    feedback: dict[str, Any] = {
        "context": seen.contexts(context),
        "action_context": seen.items(drawn.items),
        "action": action,
        "reward": drawn.reward(expected, rng),
        "pscore": logging[row, action],
    }
    log, catalogue = from_bandit_feedback(feedback)
    if user is not None:
        table = log.table.append_column("user", pa.array(user))
        log = TableLog(table, replace(log.schema, user_id="user"))
    if settings.features == "ids":
        specs = (FeatureSpec(name="item_id", kind="category"),)
        ids = pa.table({"item_id": np.arange(settings.items)})
        catalogue = Catalogue.from_table(ids, CatalogueSchema(item_id="item_id", features=specs))
    return QualityWorld(name, log, catalogue, *_truth(drawn, seen, effect, rng))


@dataclass
class _Seen:
    """The features that the learner sees."""

    settings: DegenerateWorld
    rng: np.random.Generator

    def contexts(self, context: Array) -> Array:
        kind = self.settings.features
        if kind == "noise":
            return self.rng.standard_normal(context.shape)
        return context[:, ::2] if kind == "half" else context

    def items(self, items: Array) -> Array:
        return self.contexts(items)


def _users(
    settings: DegenerateWorld, rng: np.random.Generator
) -> tuple[NDArray[np.int64] | None, Array | float]:
    """(n,) user of each row and (n, 1) its effect on the logit."""
    if not settings.users:
        return None, 0.0
    share = 1.0 / np.arange(1, settings.users + 1)
    user = rng.choice(settings.users, settings.rounds, p=share / share.sum())
    effect = rng.standard_normal(settings.users)
    return user, effect[user][:, None]


def _truth(
    drawn: _Drawn, seen: _Seen, effect: Array | float, rng: np.random.Generator
) -> tuple[Truth, dict[str, float]]:
    """Expected rewards in fresh contexts of an average over the log's users, and baselines."""
    settings = drawn.settings
    number = min(_TEST_CONTEXTS, _TEST_CELLS // settings.items)
    context = rng.standard_normal((number, settings.dim))
    z = drawn.z(context)
    if isinstance(effect, float):
        q = drawn.expected(z)
    else:
        levels, counts = np.unique(effect, return_counts=True)
        share = counts / counts.sum()
        parts = (s * drawn.expected(z, e) for e, s in zip(levels, share, strict=True))
        q = np.sum(list(parts), axis=0)

    def expected(start: int, stop: int) -> Tensor:
        return torch.from_numpy(q[start:stop])

    shown = seen.contexts(context).astype(np.float32)
    return Truth(pa.table({"context": vector_array(shown)}), expected), {
        "logging": float((drawn.logging(z) * q).sum(axis=1).mean()),
        "best_fixed": float(q.mean(axis=0).max()),
        "optimum": float(q.max(axis=1).mean()),
    }
