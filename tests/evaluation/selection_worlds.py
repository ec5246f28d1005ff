"""Small logs with known rewards, for the tests of estimator selection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offtower.evaluation import estimators as e
from offtower.evaluation.selection import Candidate, SelectionLog


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


@dataclass
class World:
    """n rows of a linear-logistic world; q (n, A) are the true expected rewards."""

    seed: int
    n: int = 1500
    items: int = 6
    target_beta: float = 4.0
    logging: tuple[float, float] = (-2.0, 2.0)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, 99])
        self.context = rng.normal(size=(self.n, 4))
        theta = np.random.default_rng(0).normal(size=(self.items, 4))
        self.item_features = theta
        self.q = 1.0 / (1.0 + np.exp(-self.context @ theta.T))
        self.policies = np.stack([softmax(b * self.q) for b in self.logging])
        self.row_policy = np.arange(self.n) % 2
        own = self.policies[self.row_policy, np.arange(self.n)]
        self.behavior = self.policies.mean(axis=0)
        self.target = softmax(self.target_beta * self.q)
        action = (own.cumsum(axis=1) < rng.uniform(size=(self.n, 1))).sum(axis=1)
        self.action = np.minimum(action, self.items - 1)
        self.reward = (rng.uniform(size=self.n) < self.q[np.arange(self.n), self.action]) * 1.0

    def log(self, models: dict[str, np.ndarray] | None = None, **more: object) -> SelectionLog:
        arguments = {
            "action": self.action,
            "reward": self.reward,
            "behavior": self.behavior,
            "target": self.target,
            "reward_models": models or {},
            "context": self.context,
            "item_features": self.item_features,
            "row_policy": self.row_policy,
            "policies": self.policies,
            **more,
        }
        return SelectionLog.from_policies(**arguments)


def candidates(*models: str) -> list[Candidate]:
    out = [Candidate("IPS", e.IPS()), Candidate("SNIPS", e.SNIPS())]
    for model in models:
        out += [
            Candidate(f"DM[{model}]", e.DM(), model),
            Candidate(f"DR[{model}]", e.DR(), model),
            Candidate(f"SNDR[{model}]", e.SNDR(), model),
        ]
    return out
