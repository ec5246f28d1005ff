"""top_k_ips maximizes the expected reward of a slate of distinct items; ips that of one item."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize

from offtower.objectives import LoggedRows, Reduction, make_objective
from offtower.ops import policy_terms

REWARD = np.array([0.5, 0.45, 0.4, 0.1, 0.05, 0.0])
K = 3


def slate_value(pi: np.ndarray) -> float:
    """Expected sum of rewards over the distinct items of K independent draws."""
    return float(((1 - (1 - pi) ** K) * REWARD).sum())


def ascend(name: str, **arguments: float) -> np.ndarray:
    """Train free logits on a log that holds every item once, with uniform propensities."""
    logits = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    objective = make_objective(name, arguments)
    action, pscore = torch.arange(6), torch.full((6,), 1 / 6, dtype=torch.float64)
    for _ in range(1500):
        terms = policy_terms(
            torch.ones(6, 1, dtype=torch.float64),
            torch.zeros(6, 1, dtype=torch.float64),
            action,
            item_bias=logits[0],
        )
        rows = LoggedRows(torch.from_numpy(REWARD), terms, pscore)
        optimizer.zero_grad()
        objective(rows, Reduction(rows=6)).loss.backward()
        optimizer.step()
    return torch.softmax(logits.detach()[0], 0).numpy()


def test_it_reaches_the_best_slate_and_ips_does_not() -> None:
    best = minimize(lambda z: -slate_value(np.exp(z) / np.exp(z).sum()), np.zeros(6), tol=1e-12)
    assert abs(slate_value(ascend("top_k_ips", k=K)) + best.fun) < 1e-3
    assert abs(slate_value(ascend("ips")) - REWARD[0]) < 0.01
    assert -best.fun > 0.95
