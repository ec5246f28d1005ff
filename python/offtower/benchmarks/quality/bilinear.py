"""Synthetic worlds after Open Bandit Pipeline's: logistic rewards, bilinear in two vectors."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower.benchmarks.quality.world import QualityWorld, Truth
from offtower.data.convert import from_bandit_feedback
from offtower.data.simulate.features import vector_array

TEST_CONTEXTS = 5_000

Array = NDArray[np.float64]


class BilinearWorld:
    """q(x, a) = sigmoid(<c, x> + <d, a> + x'Ma), coefficients uniform in [-1, 1], x and a normal.

    This is the logistic reward function of later releases of Open Bandit Pipeline, and the
    behaviour policy softmax(beta q) its usual one.

    Args:
        actions: N. beta: inverse temperature of the logging policy. dim: of x and of a.
        seed: of the world.
    """

    def __init__(self, actions: int, beta: float, seed: int, dim: int = 5) -> None:
        rng = np.random.default_rng([seed, 0])
        self.action_context = rng.standard_normal((actions, dim))
        self._c, self._d = rng.uniform(-1, 1, dim), rng.uniform(-1, 1, dim)
        self._m = rng.uniform(-1, 1, (dim, dim))
        self._dim, self._beta, self._seed = dim, beta, seed

    def expected(self, context: Array) -> Array:
        """(n, N) q."""
        a = self.action_context
        z = (context @ self._c)[:, None] + a @ self._d + context @ self._m @ a.T
        result: Array = 1.0 / (1.0 + np.exp(-z))
        return result

    def logging(self, expected: Array) -> Array:
        """(n, N) pi_0."""
        weight = np.exp(self._beta * expected)
        result: Array = weight / weight.sum(axis=1, keepdims=True)
        return result

    def contexts(self, n: int, seed: int) -> Array:
        return np.random.default_rng([self._seed, 1, seed]).standard_normal((n, self._dim))

    def sample(self, rounds: int, seed: int) -> dict[str, Array]:
        """A log as Open Bandit Pipeline's dict, without the truth."""
        rng = np.random.default_rng([self._seed, 2, seed])
        context = self.contexts(rounds, seed)
        q = self.expected(context)
        pi = self.logging(q)
        place = rng.random(rounds)[:, None]
        action = (pi.cumsum(axis=1) < place).sum(axis=1).clip(max=q.shape[1] - 1)
        row = np.arange(rounds)
        return {
            "context": context,
            "action_context": self.action_context,
            "action": action,
            "reward": (rng.random(rounds) < q[row, action]).astype(float),
            "pscore": pi[row, action],
        }


def bilinear(actions: int, beta: float, rounds: int, seed: int) -> QualityWorld:
    """A world, its log and its truth; the seed decides all three."""
    world = BilinearWorld(actions, beta, seed)
    log, catalogue = from_bandit_feedback(world.sample(rounds, seed=1))
    contexts = world.contexts(TEST_CONTEXTS, seed=99)
    q = world.expected(contexts)

    def expected(start: int, stop: int) -> Tensor:
        return torch.from_numpy(q[start:stop])

    return QualityWorld(
        name=f"bilinear {actions} actions, beta {beta:g}, n {rounds}",
        log=log,
        catalogue=catalogue,
        truth=Truth(pa.table({"context": vector_array(contexts.astype(np.float32))}), expected),
        landmarks={
            "logging": float((world.logging(q) * q).sum(axis=1).mean()),
            "best_fixed": float(q.mean(axis=0).max()),
            "optimum": float(q.max(axis=1).mean()),
        },
    )
