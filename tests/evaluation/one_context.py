"""One context, q(a) = a / (A - 1), pi_b proportional to 1 / (a + 1), pi_e to exp(3 q).

Everything about this world is a sum over actions, so that estimators have exact answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from offtower.evaluation import EvaluationRows


@dataclass
class OneContext:
    """Binary rewards; the reward model `model` is wrong on purpose."""

    items: int
    q: np.ndarray = field(init=False)
    behavior: np.ndarray = field(init=False)
    target: np.ndarray = field(init=False)
    weight: np.ndarray = field(init=False)
    model: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        action = np.arange(self.items)
        self.q = action / (self.items - 1)
        self.behavior = 1.0 / (action + 1.0)
        self.behavior /= self.behavior.sum()
        self.target = np.exp(3.0 * self.q)
        self.target /= self.target.sum()
        self.weight = self.target / self.behavior
        self.model = 0.15 + 0.6 * self.q**2
        self.cumulative = np.cumsum(self.behavior)

    @property
    def value(self) -> float:
        return float(self.target @ self.q)

    @property
    def logging_value(self) -> float:
        return float(self.behavior @ self.q)

    @property
    def modeled_value(self) -> float:
        return float(self.target @ self.model)

    def rows(self, action: np.ndarray, reward: np.ndarray) -> EvaluationRows:
        return EvaluationRows(
            self.weight[action],
            reward,
            self.model[action],
            np.full(action.size, self.modeled_value),
        )

    def sample(self, n: int, rng: np.random.Generator) -> EvaluationRows:
        action = np.minimum(np.searchsorted(self.cumulative, rng.random(n)), self.items - 1)
        return self.rows(action, (rng.random(n) < self.q[action]) * 1.0)

    def outcomes(self) -> tuple[EvaluationRows, np.ndarray]:
        """Every (action, reward) as a row, and its probability in a log."""
        action = np.tile(np.arange(self.items), 2)
        reward = np.repeat([1.0, 0.0], self.items)
        chance = np.concatenate([self.behavior * self.q, self.behavior * (1.0 - self.q)])
        return self.rows(action, reward), chance
