"""Importance fitting by a small network: the recipe of Udagawa et al. (AAAI 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offtower.errors import OfftowerError
from offtower.evaluation.rows import Array, IntArray


@dataclass(frozen=True)
class NetworkOptions:
    """Settings of the published network; Adam steps on the whole log.

    penalties: grid of lambda. tolerance: of mean p(x) from the share, for a lambda to qualify.
    """

    hidden: int = 100
    epochs: int = 5000
    learning_rate: float = 1e-3
    penalties: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        rising = list(self.penalties) == sorted(set(self.penalties)) != []
        if not rising or min(self.hidden, self.epochs) < 1 or not self.learning_rate > 0.0:
            raise OfftowerError(f"penalties must rise, all else be positive: {self}")


@dataclass(frozen=True)
class NetworkFit:
    """rho: (n, A). chosen: the penalty taken. qualified: whether it kept mean p(x) at the share."""

    rho: Array
    chosen: float
    qualified: bool


def fit_network(
    behavior: Array,
    target: Array,
    action: IntArray,
    context: Array,
    item_features: Array | None,
    *,
    share: float,
    options: NetworkOptions,
    seed: int,
) -> NetworkFit:
    """Fit rho by gradient descent on mean (w~ - w)^2 + lambda mean (p(x) - k)^2 over the rows.

    behavior, target: (n, A) probabilities. action: (n,) logged items. context: (n, d).
    item_features: (A, e); for None, log behavior and log target of each pair stand for the item.
    Items are ordered by their features first, so renumbering them changes nothing.
    The penalty is the one of least weight error among those whose mean p(x) is within the tolerance
    of k, else the one whose mean p(x) is nearest to k. Raises OfftowerError for shapes that differ,
    and where every fit went to NaN.
    """
    n, n_items = behavior.shape
    items = n_items if item_features is None else item_features.shape[0]
    if context.ndim != 2 or (context.shape[0], items, action.shape) != (n, n_items, (n,)):
        shapes = f"{behavior.shape}, {context.shape}, {action.shape}; {items} items with features"
        raise OfftowerError(f"network split: behavior, context and action do not match: {shapes}")
    keys = [behavior[-1], target[-1], behavior[0], target[0]]
    order = np.lexsort(keys if item_features is None else [*keys, *item_features.T[::-1]])
    rank = np.argsort(order)
    pi_b, pi_e = torch.from_numpy(behavior[:, order]), torch.from_numpy(target[:, order])
    logged = torch.from_numpy(rank[action])[:, None]
    weight = (pi_e.gather(1, logged) / pi_b.gather(1, logged)).squeeze(1)
    if item_features is None:
        stacked = torch.stack([one.clamp_min(1e-12).log() for one in (pi_b, pi_e)], dim=2)
        flat = stacked.reshape(-1, 2)
        item = ((stacked - flat.mean(dim=0)) / (flat.std(dim=0) + 1e-12)).float()
    else:
        item = _standardized(item_features[order])
    problem = FitProblem(pi_b, weight, logged[:, 0], _standardized(context), item)

    best: tuple[tuple[int, float], NetworkFit] | None = None
    for penalty in options.penalties:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = SplitNet(context.shape[1], item.shape[-1], options.hidden)
        trainer = SplitTrainer(net, problem, options.learning_rate)
        for _ in range(options.epochs):
            trainer.step(penalty, share)
        with torch.no_grad():
            rho = torch.sigmoid(net(problem.context, item).double()).clamp(1e-9, 1.0 - 1e-9)
        if not torch.isfinite(rho).all():
            continue
        p = (pi_b * rho).sum(dim=1)
        logged_rho = rho.gather(1, logged).squeeze(1)
        pseudo = logged_rho * (1.0 - p) / ((1.0 - logged_rho) * p)
        distance = abs(float(p.mean()) - share)
        qualified = distance <= options.tolerance
        key = (0, float(((pseudo - weight) ** 2).mean())) if qualified else (1, distance)
        if best is None or key < best[0]:
            kept = np.ascontiguousarray(rho.numpy()[:, rank])
            best = key, NetworkFit(kept, penalty, qualified)
    if best is None:
        raise OfftowerError("network split: every lambda gave non-finite rho; use method='exact'")
    return best[1]


def _standardized(values: Array) -> Tensor:
    spread = values.std(axis=0)
    scaled = (values - values.mean(axis=0)) / np.where(spread > 0.0, spread, 1.0)
    return torch.from_numpy(scaled).float()


@dataclass(frozen=True)
class FitProblem:
    """weight: target / behavior of the logged items. item: (A, e), or (n, A, e) of each pair."""

    behavior: Tensor
    weight: Tensor
    logged: Tensor
    context: Tensor
    item: Tensor


class SplitNet(nn.Module):
    """sigmoid(MLP([context, item features])), its first layer shared over items and contexts."""

    def __init__(self, dim_context: int, dim_item: int, hidden: int) -> None:
        super().__init__()
        options: Any = {"dtype": torch.float32, "device": "cpu"}
        self.first_context = nn.Linear(dim_context, hidden, **options)
        self.first_item = nn.Linear(dim_item, hidden, bias=False, **options)
        self.second = nn.Linear(hidden, hidden, **options)
        self.last = nn.Linear(hidden, 1, **options)

    def forward(self, context: Tensor, item: Tensor) -> Tensor:
        """(n, A) logits of rho."""
        mixed = self.first_context(context)[:, None, :] + self.first_item(item)
        return torch.squeeze(self.last(torch.relu(self.second(torch.relu(mixed)))), -1)


class SplitTrainer:
    """Steps of Adam on the whole log, by a closed-form gradient; each large array is made once."""

    def __init__(self, net: SplitNet, problem: FitProblem, rate: float) -> None:
        self.net, self.problem = net, problem
        self.optimizer = torch.optim.Adam(net.parameters(), lr=rate, fused=True)
        self.shape = (*problem.behavior.shape, net.second.weight.shape[0])
        self.first, self.second, self.back = (
            net.second.weight.new_empty(self.shape).flatten(0, 1) for _ in range(3)
        )

    @torch.no_grad()
    def step(self, penalty: float, share: float) -> float:
        """One step; returns the loss mean (w~ - w)^2 + penalty mean (p - k)^2 before it.

        With p = sum_a pi_b rho and w~ = exp(logit) (1 - p) / p at the logged item (rho / (1 - rho)
        is exp(logit): nothing is subtracted from one). The loss is float64.
        """
        problem, net, n = self.problem, self.net, self.shape[0]
        from_context = problem.context @ net.first_context.weight.T + net.first_context.bias
        from_item = problem.item @ net.first_item.weight.T
        torch.add(from_context[:, None, :], from_item, out=self.first.view(self.shape)).relu_()
        torch.addmm(net.second.bias, self.first, net.second.weight.T, out=self.second).relu_()
        logit = (self.second @ net.last.weight[0]).view(self.shape[:2]) + net.last.bias
        logit, rows = logit.double(), torch.arange(n, device=logit.device)
        rho = torch.sigmoid(logit)
        p = (problem.behavior * rho).sum(dim=1)
        pseudo = torch.exp(logit[rows, problem.logged]) * (1.0 - p) / p
        off, drift = pseudo - problem.weight, p - share
        by_pseudo = 2.0 / n * off
        by_p = 2.0 / n * penalty * drift - by_pseudo * pseudo / (p * (1.0 - p))
        gradient = by_p[:, None] * problem.behavior * rho * (1.0 - rho)
        gradient[rows, problem.logged] += by_pseudo * pseudo
        self._backward(gradient.float())
        self.optimizer.step()
        return float((off @ off + penalty * (drift @ drift)) / n)

    def _backward(self, gradient: Tensor) -> None:
        net, item, flat = self.net, self.problem.item, gradient.reshape(-1, 1)
        net.last.weight.grad, net.last.bias.grad = flat.T @ self.second, gradient.sum().reshape(1)
        torch.mul(flat, net.last.weight, out=self.back)
        _mask(self.back, self.second)
        net.second.weight.grad, net.second.bias.grad = (
            self.back.T @ self.first,
            self.back.sum(dim=0),
        )
        # The second layer's output is not needed any more: its memory takes the gradient.
        torch.mm(self.back, net.second.weight, out=self.second)
        _mask(self.second, self.first)
        cube = self.second.view(self.shape)
        by_context = cube.sum(dim=1)
        by_item = cube.sum(dim=0) if item.dim() == 2 else self.second
        net.first_context.weight.grad = by_context.T @ self.problem.context
        net.first_context.bias.grad = by_context.sum(dim=0)
        net.first_item.weight.grad = by_item.T @ item.reshape(-1, item.shape[-1])


def _mask(gradient: Tensor, output: Tensor) -> None:
    """In place: zero where the ReLU's output is."""
    torch.ops.aten.threshold_backward.grad_input(gradient, output, 0.0, grad_input=gradient)
