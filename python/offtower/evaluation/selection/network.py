"""Importance fitting by a small network: the recipe of Udagawa et al. (AAAI 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from offtower.errors import OfftowerError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class NetworkOptions:
    """The published settings: two hidden layers of 100, Adam, whole log per step.

    hidden: units of the two hidden layers. epochs: steps of Adam on the whole log.
    learning_rate: of Adam. penalties: the grid of lambda. tolerance: how far mean p(x) may be from
    the share for a lambda to qualify.
    """

    hidden: int = 100
    epochs: int = 5000
    learning_rate: float = 1e-3
    penalties: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    tolerance: float = 0.02


@dataclass(frozen=True)
class PenaltyTrial:
    """One lambda of the grid: its fit of the weights, the mean share, and whether it qualified."""

    penalty: float
    weight_error: float
    mean_share: float
    qualified: bool


@dataclass(frozen=True)
class NetworkFit:
    """rho: (n, A). chosen: the penalty taken. trials: the grid, for reports."""

    rho: Array
    chosen: float
    trials: tuple[PenaltyTrial, ...]

    @property
    def qualified(self) -> bool:
        """Whether the chosen penalty kept the mean share within the tolerance."""
        return any(t.qualified for t in self.trials if t.penalty == self.chosen)


class _SplitNet(nn.Module):
    """sigmoid(MLP([context, item features])), its first layer shared over items and contexts."""

    def __init__(self, dim_context: int, dim_item: int, hidden: int) -> None:
        super().__init__()
        self.first_context = nn.Linear(dim_context, hidden)
        self.first_item = nn.Linear(dim_item, hidden, bias=False)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 1)

    def forward(self, context: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        mixed = self.first_context(context)[:, None, :] + self.first_item(item)
        hidden = torch.relu(self.second(torch.relu(mixed)))
        return self.last(hidden).squeeze(-1)  # logits of rho


def fit_network(
    behavior: Array,
    target: Array,
    action: NDArray[np.int64],
    context: Array,
    item_features: Array | None,
    *,
    share: float,
    options: NetworkOptions,
    seed: int,
) -> NetworkFit:
    """Fit rho by gradient descent on mean (w~ - w)^2 + lambda mean (p(x) - k)^2 over the rows.

    behavior, target: (n, A) probabilities. action: (n,) logged items. context: (n, d).
    item_features: (A, e), or None: then the items are told apart by log behavior and log target of
    each pair (x, a), never by an ordinal number. Items are put in an order given by their features
    before anything is computed, so renumbering them changes nothing.
    The penalty is the one of least weight error among those whose mean p(x) is within the tolerance
    of k; where none qualifies, the one whose mean p(x) is nearest to k. A fit that went to NaN does
    not count. Raises OfftowerError when every fit did.
    """
    n, n_items = behavior.shape
    if context.ndim != 2 or context.shape[0] != n or action.shape != (n,):
        raise OfftowerError(
            f"network split: behavior has {n} rows, context shape {context.shape}, action shape "
            f"{action.shape}; expected (n, d) and (n,)."
        )
    if item_features is not None and item_features.shape[:1] != (n_items,):
        raise OfftowerError(
            f"item_features has shape {item_features.shape}, expected ({n_items}, e)."
        )
    order = _canonical_order(behavior, target, item_features)
    rank = np.empty(n_items, dtype=np.int64)
    rank[order] = np.arange(n_items)
    pi_b = torch.from_numpy(behavior[:, order])
    pi_e = torch.from_numpy(target[:, order])
    logged = torch.from_numpy(rank[action])[:, None]
    item = _item_inputs(pi_b, pi_e, None if item_features is None else item_features[order])
    inputs = torch.from_numpy(_standardise(context)).float()
    weight = (pi_e.gather(1, logged) / pi_b.gather(1, logged)).squeeze(1).float()

    trials: list[PenaltyTrial] = []
    best: tuple[tuple[int, float], float, Array] | None = None
    for penalty in options.penalties:
        rho = _train(pi_b.float(), weight, logged, inputs, item, penalty, share, options, seed)
        if not torch.isfinite(rho).all():
            trials.append(PenaltyTrial(penalty, float("nan"), float("nan"), False))
            continue
        p = (pi_b * rho).sum(dim=1)
        logged_rho = rho.gather(1, logged).squeeze(1)
        pseudo = logged_rho * (1.0 - p) / ((1.0 - logged_rho) * p)
        error = float(((pseudo - weight) ** 2).mean())
        mean_share = float(p.mean())
        qualified = abs(mean_share - share) <= options.tolerance
        trials.append(PenaltyTrial(penalty, error, mean_share, qualified))
        key = (0, error) if qualified else (1, abs(mean_share - share))
        if best is None or key < best[0]:
            best = (key, penalty, rho.numpy()[:, rank])
    if best is None:
        raise OfftowerError(
            "network split: every lambda of the grid gave non-finite probabilities (weights too "
            "large?). Use method='exact', or a smaller learning rate."
        )
    return NetworkFit(np.ascontiguousarray(best[2]), best[1], tuple(trials))


def _train(
    pi_b: torch.Tensor,
    weight: torch.Tensor,
    logged: torch.Tensor,
    context: torch.Tensor,
    item: torch.Tensor,
    penalty: float,
    share: float,
    options: NetworkOptions,
    seed: int,
) -> torch.Tensor:
    """One network, one penalty: rho (n, A) float64, in the canonical item order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _SplitNet(context.shape[1], item.shape[-1], options.hidden)
    optimiser = torch.optim.Adam(net.parameters(), lr=options.learning_rate)
    for _ in range(options.epochs):
        optimiser.zero_grad(set_to_none=True)
        logit = net(context, item)
        p = (pi_b * torch.sigmoid(logit)).sum(dim=1)
        # rho / (1 - rho) = exp(logit): no subtraction from one
        pseudo = torch.exp(logit.gather(1, logged).squeeze(1)) * (1.0 - p) / p
        loss = ((pseudo - weight) ** 2).mean() + penalty * ((p - share) ** 2).mean()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        tiny = 1e-9
        return torch.sigmoid(net(context, item).double()).clamp(tiny, 1.0 - tiny)


def _item_inputs(
    pi_b: torch.Tensor, pi_e: torch.Tensor, item_features: Array | None
) -> torch.Tensor:
    """(A, e) standardised item features, or (n, A, 2) log-probabilities where there are none."""
    if item_features is not None:
        return torch.from_numpy(_standardise(item_features)).float()
    floor = 1e-12
    stacked = torch.stack([pi_b.clamp_min(floor).log(), pi_e.clamp_min(floor).log()], dim=2)
    flat = stacked.reshape(-1, 2)
    return ((stacked - flat.mean(dim=0)) / (flat.std(dim=0) + 1e-12)).float()


def _standardise(values: Array) -> Array:
    spread = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(spread > 0.0, spread, 1.0)


def _canonical_order(
    behavior: Array, target: Array, item_features: Array | None
) -> NDArray[np.int64]:
    """An order of the items that depends on what they are, not on their numbers."""
    keys = [behavior[-1], target[-1], behavior[0], target[0]]
    if item_features is not None:
        keys += list(item_features.T[::-1])
    return np.lexsort(keys)
