"""Simulated logs with logistic rewards, bilinear in a context and an action vector, as in OBP."""

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

    The reward function is OBP's logistic one, the logging policy is softmax(beta q).

    Args:
        actions: Number of actions, N.
        beta: Inverse temperature of the logging policy.
        seed: Seed of coefficients and action vectors.
        dim: Dimension of context and action vectors.
    """

    def __init__(self, actions: int, beta: float, seed: int, dim: int = 5) -> None:
        rng = np.random.default_rng([seed, 0])
        self.action_context = rng.standard_normal((actions, dim))
        self._c, self._d = rng.uniform(-1, 1, dim), rng.uniform(-1, 1, dim)
        self._m = rng.uniform(-1, 1, (dim, dim))
        self._dim, self._beta, self._seed = dim, beta, seed

    def expected(self, context: Array) -> Array:
        """Return the (n, N) expected rewards."""
        a = self.action_context
        z = (context @ self._c)[:, None] + a @ self._d + context @ self._m @ a.T
        result: Array = 1.0 / (1.0 + np.exp(-z))
        return result

    def logging(self, expected: Array) -> Array:
        """Return the (n, N) probabilities of the logging policy."""
        weight = np.exp(self._beta * expected)
        result: Array = weight / weight.sum(axis=1, keepdims=True)
        return result

    def contexts(self, n: int, seed: int) -> Array:
        return np.random.default_rng([self._seed, 1, seed]).standard_normal((n, self._dim))

    def sample(self, rounds: int, seed: int) -> dict[str, Array]:
        """Draw a log as OBP's dict, without expected rewards."""
        rng = np.random.default_rng([self._seed, 2, seed])
        context = self.contexts(rounds, seed)
        q = self.expected(context)
        pi = self.logging(q)
        uniform = rng.random(rounds)[:, None]
        action = (pi.cumsum(axis=1) < uniform).sum(axis=1).clip(max=q.shape[1] - 1)
        row = np.arange(rounds)
        return {
            "context": context,
            "action_context": self.action_context,
            "action": action,
            "reward": (rng.random(rounds) < q[row, action]).astype(float),
            "pscore": pi[row, action],
        }


def bilinear(actions: int, beta: float, rounds: int, seed: int) -> QualityWorld:
    """Return a world with its log and true expected rewards, all drawn from `seed`."""
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
        baselines={
            "logging": float((world.logging(q) * q).sum(axis=1).mean()),
            "best_fixed": float(q.mean(axis=0).max()),
            "optimum": float(q.max(axis=1).mean()),
        },
    )
