"""The gradient of every objective against its published formula, by enumeration in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from offtower.errors import ConfigError
from offtower.objectives import (
    ItemScores,
    LoggedRows,
    Objective,
    Reduction,
    Regression,
    Regularized,
    make_objective,
)
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


def covered_snips(p: Problem) -> np.ndarray:
    """Of a value that lacks nothing off the log, or counts it as 0."""
    return snips(p) if p.weight.mean() >= 1 else coefficients(p, p.weight * p.reward)


CLIP, K = 1.5, 3
FORMULAS: dict[str, tuple[dict[str, Any], Callable[[Problem], np.ndarray]]] = {
    "ips": ({}, lambda p: coefficients(p, p.weight * p.reward)),
    "clipped_ips": (
        {"max_weight": CLIP},
        lambda p: coefficients(p, np.minimum(p.weight, CLIP) * p.reward),
    ),
    "snips": ({}, covered_snips),
    "snips, off the log ignored": ({"off_log": "ignored"}, snips),
    "top_k_ips": (
        {"k": K, "max_weight": CLIP},
        lambda p: coefficients(
            p,
            np.minimum(p.weight, CLIP)
            * K
            * (1 - p.pi[np.arange(ROWS), p.action]) ** (K - 1)
            * p.reward,
        ),
    ),
    "dr": ({}, lambda p: coefficients(p, p.weight * p.residual) + p.model_part() / ROWS),
    "clipped_dr": (
        {"max_weight": CLIP},
        lambda p: coefficients(p, np.minimum(p.weight, CLIP) * p.residual) + p.model_part() / ROWS,
    ),
    "weighted_likelihood": (
        {"max_weight": 4.0},
        lambda p: coefficients(p, np.minimum(1 / p.pscore, 4.0) * p.reward),
    ),
    "weighted_likelihood, smoothed": (
        {"max_weight": 4.0, "smoothing": 0.5},
        lambda p: coefficients(p, np.minimum(p.pscore**-0.5, 4.0) * p.reward),
    ),
    "behavior_cloning": ({}, lambda p: coefficients(p, np.ones(ROWS))),
    "behavior_cloning, known propensities": (
        {"known_propensities": True, "max_weight": CLIP},
        lambda p: coefficients(p, 1.0 - np.minimum(p.weight, CLIP)),
    ),
}
VALUES: dict[str, Callable[[Problem], float]] = {
    "ips": lambda p: (p.weight * p.reward).mean(),
    "clipped_ips": lambda p: (np.minimum(p.weight, CLIP) * p.reward).mean(),
    "snips": lambda p: (p.weight * p.reward).sum() / max(ROWS, p.weight.sum()),
    "snips, off the log ignored": lambda p: (p.weight * p.reward).sum() / p.weight.sum(),
    "top_k_ips": lambda p: (np.minimum(p.weight, CLIP) * p.reward).mean(),
    "dr": lambda p: (p.weight * p.residual + (p.pi * p.q).sum(1)).mean(),
    "clipped_dr": lambda p: (np.minimum(p.weight, CLIP) * p.residual + (p.pi * p.q).sum(1)).mean(),
    "weighted_likelihood": lambda p: (p.weight * p.reward).mean(),
    "weighted_likelihood, smoothed": lambda p: (p.weight * p.reward).mean(),
    "behavior_cloning": lambda p: (p.weight * p.reward).mean(),
    "behavior_cloning, known propensities": lambda p: (p.weight * p.reward).mean(),
}


def made(name: str) -> Objective:
    """The objective of a line of FORMULAS; what follows its name tells settings apart."""
    return make_objective(re.split(r"[ ,]", name)[0], FORMULAS[name][0])


def gradients(p: Problem, objective: Objective) -> tuple[list[torch.Tensor], float]:
    u, v, b = (torch.from_numpy(x).requires_grad_() for x in (p.u, p.v, p.b))
    terms = policy_terms(
        u,
        v,
        torch.from_numpy(p.action),
        temperature=TAU,
        item_bias=b,
        reward_model=DenseReward(torch.from_numpy(p.q))
        if objective.requirements.reward_model
        else None,
        entropy=objective.requirements.entropy,
    )
    rows = LoggedRows(torch.from_numpy(p.reward), terms, torch.from_numpy(p.pscore))
    result = objective(rows, Reduction(rows=ROWS))
    result.loss.backward()
    return [x.grad for x in (u, v, b) if x.grad is not None], float(result.value)


@pytest.mark.parametrize("seed", range(5, 10))
@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_and_value_are_the_formula(name: str, seed: int) -> None:
    formula = FORMULAS[name][1]
    p = Problem.draw(seed)
    d_logits = formula(p)
    expected = [d_logits @ p.v / TAU, d_logits.T @ p.u / TAU, d_logits.sum(0)]
    found, value = gradients(p, made(name))
    assert len(found) == 3
    for grad, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(-grad.numpy(), wanted, rtol=0, atol=1e-12)
    assert value == pytest.approx(VALUES[name](p), abs=1e-12)


def test_problems_lie_on_both_sides_of_a_mean_weight_of_one() -> None:
    assert {bool(Problem.draw(seed).weight.mean() >= 1) for seed in range(5, 10)} == {False, True}


@pytest.mark.parametrize("seed", range(5, 10))
def test_snips_does_not_depend_on_the_level_of_rewards(seed: int) -> None:
    p = Problem.draw(seed)
    wanted, value = gradients(p, make_objective("snips").above(0.0))
    found, shifted = gradients(replace(p, reward=p.reward - 7.0), make_objective("snips").above(-7))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert shifted == pytest.approx(value - 7.0, abs=1e-12)


def test_snips_refuses_other_values_of_off_log() -> None:
    with pytest.raises(ConfigError, match="'off_log' must be lowest or ignored, got 'none'"):
        make_objective("snips", {"off_log": "none"})


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
        LoggedRows(torch.from_numpy(reward), ItemScores(logit)), Reduction(rows=ROWS)
    )
    result.loss.backward()
    s = logit.detach().numpy()
    wanted = (1 / (1 + np.exp(-s)) - reward) if loss == "cross_entropy" else 2 * (s - reward)
    assert logit.grad is not None
    np.testing.assert_allclose(logit.grad.numpy(), wanted / ROWS, atol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("cuts", [(3,), (1, 2)])
def test_workers_on_uneven_batches_add_up_to_one_worker(name: str, cuts: tuple[int, ...]) -> None:
    """The sum over workers of local gradients is the joined batch's gradient."""
    objective = made(name)
    p = Problem.draw(5)
    whole, _ = gradients(p, objective)
    parts = np.split(np.arange(ROWS), cuts)

    def run(part: np.ndarray, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        u, v, b = (torch.from_numpy(x).requires_grad_() for x in (p.u, p.v, p.b))
        terms = policy_terms(
            u[part],
            v,
            torch.from_numpy(p.action[part]),
            temperature=TAU,
            item_bias=b,
            reward_model=DenseReward(torch.from_numpy(p.q[part]))
            if objective.requirements.reward_model
            else None,
        )
        rows = LoggedRows(torch.from_numpy(p.reward[part]), terms, torch.from_numpy(p.pscore[part]))
        objective(rows, Reduction(ROWS, reduce)).loss.backward()
        return [x.grad for x in (u, v, b) if x.grad is not None]

    # Passes stand in for the all-reduce: each knows the sums that the passes before recorded. A
    # sum may depend on an earlier one (a deviation on a mean), so there are as many as sums.
    totals: list[torch.Tensor] = []
    for _ in range(4):
        recorded: list[list[torch.Tensor]] = []
        for part in parts:
            calls: list[torch.Tensor] = []
            known = iter(totals)

            def record(
                x: torch.Tensor,
                calls: list[torch.Tensor] = calls,
                known: Iterator[torch.Tensor] = known,
            ) -> torch.Tensor:
                calls.append(x)
                return next(known, x)

            run(part, record)
            recorded.append(calls)
        totals = [sum(c) for c in zip(*recorded, strict=True)]

    added = [torch.zeros_like(g) for g in whole]
    for part in parts:
        position = iter(totals)
        for total, grad in zip(added, run(part, lambda _: next(position)), strict=True):  # noqa: B023
            total += grad
    for total, grad in zip(added, whole, strict=True):
        torch.testing.assert_close(total, grad, rtol=0, atol=1e-12)


def regularized(p: Problem, **strengths: float) -> tuple[list[torch.Tensor], float]:
    return gradients(p, Regularized(make_objective("ips"), **strengths))


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_regularizers(seed: int) -> None:
    p = Problem.draw(seed)
    plain, value = regularized(p)
    h = -(p.pi * np.log(p.pi)).sum(1)
    parts = {
        "kl": -coefficients(p, p.weight * np.log(p.weight)),
        "imitation": coefficients(p, np.ones(ROWS)),
        # d h_i / d logit_ij = -pi_ij (log pi_ij + h_i)
        "entropy": -p.pi * (np.log(p.pi) + h[:, None]) / ROWS,
    }
    for name, d_logits in parts.items():
        wanted = [d_logits @ p.v / TAU, d_logits.T @ p.u / TAU, d_logits.sum(0)]
        found, same_value = regularized(p, **{name: 0.7})
        assert same_value == value
        for grad, without, part in zip(found, plain, wanted, strict=True):
            np.testing.assert_allclose(-(grad - without).numpy(), 0.7 * part, rtol=0, atol=1e-12)


def test_regularized_objectives_keep_their_requirements() -> None:
    for name in ("dr", "mixed_negatives", "weighted_likelihood"):
        plain = make_objective(name).requirements
        found = Regularized(make_objective(name), kl=1.0, entropy=1.0).requirements
        wanted = replace(plain, pscore=True, entropy=True, rewarded_rows_only=False)
        assert found == wanted


def test_kl_estimate_is_unbiased_and_never_negative() -> None:
    """Over the logging policy the regularizer's mean is KL(pi || pi_0), action by action."""
    rng = np.random.default_rng(0)
    pi, pi_0 = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    terms = policy_terms(
        torch.ones(6, 1, dtype=torch.float64),
        torch.zeros(6, 1, dtype=torch.float64),
        torch.arange(6),
        item_bias=torch.from_numpy(np.log(pi)),
    )
    rows = LoggedRows(torch.zeros(6, dtype=torch.float64), terms, torch.from_numpy(pi_0))
    per_action = [
        float(Regularized(make_objective("ips"), kl=1.0)(_row(rows, i), Reduction(1)).loss)
        for i in range(6)
    ]
    assert min(per_action) >= 0.0
    assert np.dot(pi_0, per_action) == pytest.approx(float((pi * np.log(pi / pi_0)).sum()))


def _row(rows: LoggedRows, i: int) -> LoggedRows:
    assert rows.pscore is not None
    terms = rows.policy_terms()
    one = replace(terms, log_prob=terms.log_prob[i : i + 1])
    return LoggedRows(rows.reward[i : i + 1], one, rows.pscore[i : i + 1])


def test_extreme_weights_leave_clipped_objectives_finite() -> None:
    p = Problem.draw(2)
    p.pscore = np.full(ROWS, 1e-30)
    for name in ("clipped_ips", "clipped_dr"):
        found, value = gradients(p, make_objective(name))
        assert np.isfinite(value) and all(bool(torch.isfinite(g).all()) for g in found), name
