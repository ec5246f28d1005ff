"""The gradient of every objective against its published formula, by enumeration in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from offtower.objectives import LoggedRows, Objective, Reduction, Regression, make_objective
from offtower.ops import DenseReward, policy_terms

TAU = 0.7
ROWS, ITEMS, DIM = 7, 5, 3


@dataclass
class Problem:
    u: np.ndarray
    v: np.ndarray
    b: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    pscore: np.ndarray
    q: np.ndarray

    @classmethod
    def draw(cls, seed: int) -> Problem:
        rng = np.random.default_rng(seed)
        return cls(
            u=rng.normal(size=(ROWS, DIM)),
            v=rng.normal(size=(ITEMS, DIM)),
            b=rng.normal(size=ITEMS),
            action=rng.integers(0, ITEMS, ROWS),
            reward=rng.uniform(0, 1, ROWS).round(2),
            pscore=rng.uniform(0.02, 1.0, ROWS),
            q=rng.uniform(0, 1, (ROWS, ITEMS)),
        )

    @property
    def logits(self) -> np.ndarray:
        return self.u @ self.v.T / TAU + self.b

    @property
    def pi(self) -> np.ndarray:
        e = np.exp(self.logits - self.logits.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    @property
    def weight(self) -> np.ndarray:
        return self.pi[np.arange(ROWS), self.action] / self.pscore

    @property
    def residual(self) -> np.ndarray:
        return self.reward - self.q[np.arange(ROWS), self.action]

    def score_of_action(self) -> np.ndarray:
        """(rows, items): d log pi(a_i|x_i) / d logit_ij."""
        return np.eye(ITEMS)[self.action] - self.pi

    def model_part(self) -> np.ndarray:
        """(rows, items): sum_a q(x_i, a) d pi(a|x_i) / d logit_ij, action by action."""
        total = np.zeros((ROWS, ITEMS))
        for a in range(ITEMS):
            score = np.eye(ITEMS)[a] - self.pi
            total += (self.q[:, a] * self.pi[:, a])[:, None] * score
        return total


def coefficients(p: Problem, factor: np.ndarray) -> np.ndarray:
    """d objective / d logits for mean_i factor_i grad log pi(a_i|x_i)."""
    return factor[:, None] * p.score_of_action() / ROWS


def snips(p: Problem) -> np.ndarray:
    value = (p.weight * p.reward).sum() / p.weight.sum()
    return coefficients(p, p.weight * (p.reward - value)) * ROWS / p.weight.sum()


LAMBDA, CLIP = 0.3, 1.5
FORMULAS: dict[str, tuple[dict[str, float], Callable[[Problem], np.ndarray]]] = {
    "ips": ({}, lambda p: coefficients(p, p.weight * p.reward)),
    "clipped_ips": (
        {"max_weight": CLIP},
        lambda p: coefficients(p, np.minimum(p.weight, CLIP) * p.reward),
    ),
    "snips": ({}, snips),
    "dr": ({}, lambda p: coefficients(p, p.weight * p.residual) + p.model_part() / ROWS),
    "clipped_dr": (
        {"max_weight": CLIP},
        lambda p: coefficients(p, np.minimum(p.weight, CLIP) * p.residual) + p.model_part() / ROWS,
    ),
    "weighted_likelihood": (
        {"max_weight": 4.0},
        lambda p: coefficients(p, np.minimum(1 / p.pscore, 4.0) * p.reward),
    ),
    "log_smoothing": (
        {"lambda_": LAMBDA},
        lambda p: coefficients(p, p.weight * p.reward / (1 + LAMBDA * p.weight * p.reward)),
    ),
}
VALUES: dict[str, Callable[[Problem], float]] = {
    "ips": lambda p: (p.weight * p.reward).mean(),
    "clipped_ips": lambda p: (np.minimum(p.weight, CLIP) * p.reward).mean(),
    "snips": lambda p: (p.weight * p.reward).sum() / p.weight.sum(),
    "dr": lambda p: (p.weight * p.residual + (p.pi * p.q).sum(1)).mean(),
    "clipped_dr": lambda p: (np.minimum(p.weight, CLIP) * p.residual + (p.pi * p.q).sum(1)).mean(),
    "weighted_likelihood": lambda p: (p.weight * p.reward).mean(),
    "log_smoothing": lambda p: (np.log1p(LAMBDA * p.weight * p.reward) / LAMBDA).mean(),
}


def gradients(p: Problem, objective: Objective) -> tuple[list[torch.Tensor], float]:
    u, v, b = (torch.from_numpy(x).requires_grad_() for x in (p.u, p.v, p.b))
    terms = policy_terms(
        u,
        v,
        torch.from_numpy(p.action),
        temperature=TAU,
        item_bias=b,
        reward_model=DenseReward(torch.from_numpy(p.q)) if objective.needs_reward_model else None,
    )
    rows = LoggedRows(torch.from_numpy(p.reward), terms, torch.from_numpy(p.pscore))
    result = objective(rows, Reduction(rows=ROWS))
    result.loss.backward()
    return [x.grad for x in (u, v, b) if x.grad is not None], float(result.value)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_and_value_are_the_formula(name: str, seed: int) -> None:
    arguments, formula = FORMULAS[name]
    p = Problem.draw(seed)
    d_logits = formula(p)
    expected = [d_logits @ p.v / TAU, d_logits.T @ p.u / TAU, d_logits.sum(0)]
    found, value = gradients(p, make_objective(name, arguments))
    assert len(found) == 3
    for grad, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(-grad.numpy(), wanted, rtol=0, atol=1e-12)
    assert value == pytest.approx(VALUES[name](p), abs=1e-12)


@pytest.mark.parametrize("name", ["ips", "dr"])
def test_gradient_equals_autograd_of_a_naive_softmax(name: str) -> None:
    p = Problem.draw(11)
    u, v, b = (torch.from_numpy(x).requires_grad_() for x in (p.u, p.v, p.b))
    pi = torch.softmax(u @ v.T / TAU + b, dim=1)
    action = torch.from_numpy(p.action)
    weight = pi[torch.arange(ROWS), action] / torch.from_numpy(p.pscore)
    if name == "ips":
        value = (weight * torch.from_numpy(p.reward)).mean()
    else:
        residual = torch.from_numpy(p.residual)
        value = (weight * residual + (pi * torch.from_numpy(p.q)).sum(1)).mean()
    (-value).backward()
    found, _ = gradients(p, make_objective(name))
    for grad, wanted in zip(found, (u.grad, v.grad, b.grad), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_regression_gradient(loss: str) -> None:
    p = Problem.draw(3)
    reward = (p.reward > 0.5).astype(float) if loss == "cross_entropy" else p.reward
    logit = torch.from_numpy(p.logits[np.arange(ROWS), p.action]).requires_grad_()
    result = Regression(loss)(
        LoggedRows(torch.from_numpy(reward), action_logit=logit), Reduction(rows=ROWS)
    )
    result.loss.backward()
    s = logit.detach().numpy()
    wanted = (1 / (1 + np.exp(-s)) - reward) if loss == "cross_entropy" else 2 * (s - reward)
    assert logit.grad is not None
    np.testing.assert_allclose(logit.grad.numpy(), wanted / ROWS, atol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("cuts", [(3,), (1, 2)])
def test_workers_on_uneven_batches_average_to_one_worker(name: str, cuts: tuple[int, ...]) -> None:
    """Mean over R workers of local gradients, as DDP takes it, is the joined batch's gradient."""
    arguments, _ = FORMULAS[name]
    objective = make_objective(name, arguments)
    p = Problem.draw(5)
    whole, _ = gradients(p, objective)
    parts = np.split(np.arange(ROWS), cuts)
    workers = len(parts)

    # Two passes stand in for the all-reduce: the first records local sums, the second reads them.
    recorded: list[list[torch.Tensor]] = []

    def run(part: np.ndarray, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        u, v, b = (torch.from_numpy(x).requires_grad_() for x in (p.u, p.v, p.b))
        terms = policy_terms(
            u[part],
            v,
            torch.from_numpy(p.action[part]),
            temperature=TAU,
            item_bias=b,
            reward_model=DenseReward(torch.from_numpy(p.q[part]))
            if objective.needs_reward_model
            else None,
        )
        rows = LoggedRows(torch.from_numpy(p.reward[part]), terms, torch.from_numpy(p.pscore[part]))
        objective(rows, Reduction(ROWS, workers, reduce)).loss.backward()
        return [x.grad for x in (u, v, b) if x.grad is not None]

    for part in parts:
        calls: list[torch.Tensor] = []

        def record(x: torch.Tensor, calls: list[torch.Tensor] = calls) -> torch.Tensor:
            calls.append(x)
            return x

        run(part, record)
        recorded.append(calls)
    totals = [sum(c) for c in zip(*recorded, strict=True)]

    averaged = [torch.zeros_like(g) for g in whole]
    for part in parts:
        # SNIPS sums the weight first and weight x reward second; both do not depend on totals.
        position = iter(totals)
        for total, grad in zip(averaged, run(part, lambda _: next(position)), strict=True):  # noqa: B023
            total += grad / workers
    for total, grad in zip(averaged, whole, strict=True):
        torch.testing.assert_close(total, grad, rtol=0, atol=1e-12)
