"""POTEC's loss against its formula, from an explicit first and second stage, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offtower.errors import ConfigError
from offtower.objectives import LoggedRows, Reduction, make_objective
from offtower.ops import DenseReward, policy_terms

ROWS, ITEMS, DIM, HEAD, KAPPA, CLIP = 9, 7, 3, 2, 2.5, 2.0
CLUSTER = np.array([0, 1, 0, 2, 1, 1, 0])


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Problem:
    """f = <u, v> + b is frozen; h = <head, table[c]> learns."""

    def __init__(self, cluster: np.ndarray, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.cluster = cluster
        self.number = int(cluster.max()) + 1
        self.u, self.v = rng.normal(size=(ROWS, DIM)), rng.normal(size=(ITEMS, DIM))
        self.b = rng.normal(size=ITEMS)
        self.head = rng.normal(size=(ROWS, HEAD))
        self.table = rng.normal(size=(self.number, HEAD))
        self.action = rng.integers(0, ITEMS, ROWS)
        self.reward = rng.uniform(0, 1, ROWS)
        self.q = rng.uniform(0, 1, (ROWS, ITEMS))
        self.pi0 = softmax(rng.normal(size=(ROWS, ITEMS)))
        self.rows = np.arange(ROWS)
        self.f = self.u @ self.v.T + self.b

    def stages(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows, clusters) pi_1 and (rows, items) pi_2 within each item's cluster."""
        h = self.head @ self.table.T
        first, second = np.empty((ROWS, self.number)), np.empty((ROWS, ITEMS))
        for c in range(self.number):
            member = self.cluster == c
            second[:, member] = softmax(KAPPA * self.f[:, member])
            first[:, c] = h[:, c] + np.log(np.exp(KAPPA * self.f[:, member]).sum(1))
        return softmax(first), second

    def log_weight(self) -> np.ndarray:
        first, _ = self.stages()
        logging = np.stack(
            [self.pi0[:, self.cluster == c].sum(1) for c in range(self.number)], axis=1
        )
        c = self.cluster[self.action]
        return np.log(first[self.rows, c] / logging[self.rows, c])

    def gradient(self) -> tuple[np.ndarray, np.ndarray]:
        """The objective's, for head and table, by the formula and pi_1's own derivative."""
        first, second = self.stages()
        weight = np.minimum(np.exp(self.log_weight()), CLIP)
        correction = weight * (self.reward - self.q[self.rows, self.action])
        # d log pi_1(c|x) / d h(x, k) = 1[c = k] - pi_1(k|x); pi_2 has no derivative.
        score = np.eye(self.number)[None] - first[:, None, :]
        by_h = correction[:, None] * score[self.rows, self.cluster[self.action]]
        for a in range(ITEMS):
            c = self.cluster[a]
            by_h += (self.q[:, a] * second[:, a] * first[:, c])[:, None] * score[:, c]
        return by_h @ self.table / ROWS, by_h.T @ self.head / ROWS

    def terms(self) -> tuple[torch.Tensor, torch.Tensor, LoggedRows]:
        """Head and table as leaves, and the rows that the objective sees."""
        head, table = (torch.from_numpy(x).requires_grad_() for x in (self.head, self.table))
        u = torch.cat([KAPPA * torch.from_numpy(self.u), head], dim=1)
        v = torch.cat([torch.from_numpy(self.v), table[torch.from_numpy(self.cluster)]], dim=1)
        terms = policy_terms(
            u,
            v,
            torch.from_numpy(self.action),
            item_bias=KAPPA * torch.from_numpy(self.b),
            reward_model=DenseReward(torch.from_numpy(self.q)),
        )
        pscore = torch.from_numpy(self.pi0[self.rows, self.action])
        weight = torch.from_numpy(self.log_weight())
        rows = LoggedRows(
            torch.from_numpy(self.reward), terms=terms, pscore=pscore, log_cluster_weight=weight
        )
        return head, table, rows


def test_the_gradient_is_potecs() -> None:
    problem = Problem(CLUSTER)
    assert (np.exp(problem.log_weight()) > CLIP).any(), "a weight is clipped"
    head, table, rows = problem.terms()
    result = make_objective("potec", {"max_weight": CLIP})(rows, Reduction(ROWS))
    found = torch.autograd.grad(-result.loss, (head, table))
    for one, wanted in zip(found, problem.gradient(), strict=True):
        np.testing.assert_allclose(one.numpy(), wanted, rtol=0, atol=1e-12)


def test_the_value_is_the_estimate() -> None:
    problem = Problem(CLUSTER)
    first, second = problem.stages()
    pi = first[:, problem.cluster] * second
    residual = problem.reward - problem.q[problem.rows, problem.action]
    weight = np.minimum(np.exp(problem.log_weight()), CLIP)
    wanted = (weight * residual + (pi * problem.q).sum(1)).mean()
    _, _, rows = problem.terms()
    result = make_objective("potec", {"max_weight": CLIP})(rows, Reduction(ROWS))
    assert result.value.item() == pytest.approx(wanted, rel=1e-12)


def test_clusters_of_one_item_are_clipped_dr() -> None:
    problem = Problem(np.arange(ITEMS))
    gradients = []
    for name in ("potec", "clipped_dr"):
        head, table, rows = problem.terms()
        result = make_objective(name, {"max_weight": CLIP})(rows, Reduction(ROWS))
        gradients.append(torch.autograd.grad(result.loss, (head, table)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": 1}, "a number of two or more, got 1"),
        ({"clusters": 2.5}, "got 2.5"),
        ({"clusters": True}, "got True"),
        ({"inverse_temperature": 0.0}, "'inverse_temperature' must be a positive number"),
        ({"max_weight": -1.0}, "'max_weight' must be a positive number"),
    ],
)
def test_wrong_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_objective("potec", settings)
