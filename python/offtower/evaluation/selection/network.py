"""Importance fitting by a small network: the recipe of Udagawa et al. (AAAI 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offtower.errors import OfftowerError
from offtower.evaluation.rows import Array
from offtower.evaluation.selection.log import DensePolicies


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
    source: DensePolicies, share: float, options: NetworkOptions, seed: int = 0
) -> NetworkFit:
    """Fit rho by gradient descent on mean (w~ - w)^2 + lambda mean (p(x) - k)^2 over the rows.

    Without item features, log behavior and log target of each pair stand for the item. Items are
    ordered by their features first, so renumbering them changes nothing.
    The penalty is the one of least weight error among those whose mean p(x) is within the tolerance
    of k, else the one whose mean p(x) is nearest to k. Raises OfftowerError without contexts, for
    shapes that differ, and where every fit went to NaN.
    """
    features, (n, n_items) = source.item_features, source.behavior.shape
    if source.context is None:
        raise OfftowerError(
            "importance_fit='network' needs the contexts: SelectionLog.from_policies(context=...)."
        )
    items = n_items if features is None else features.shape[0]
    if source.context.ndim != 2 or (source.context.shape[0], items) != (n, n_items):
        raise OfftowerError(
            f"network split: policies {source.behavior.shape}, context {source.context.shape} and "
            f"{items} items with features do not match"
        )
    keys = [source.behavior[-1], source.target[-1], source.behavior[0], source.target[0]]
    order = np.lexsort(keys if features is None else [*keys, *features.T[::-1]])
    rank = np.argsort(order)
    behavior, target = source.behavior[:, order], source.target[:, order]
    pi_b, pi_e = torch.from_numpy(behavior), torch.from_numpy(target)
    logged = torch.from_numpy(rank[source.action])[:, None]
    weight = (pi_e / pi_b).gather(1, logged)
    context = _standardized(source.context)
    if features is None:
        item = _standardized(np.log(np.stack([behavior, target], axis=2).clip(1e-12)))
    else:
        item = _standardized(features[order])

    def terms(logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """rho, p(x) (n, 1) and w~ of the logged items (n, 1); rho / (1 - rho) is exp(logit)."""
        rho = torch.sigmoid(logit)
        p = (pi_b * rho).sum(dim=1, keepdim=True)
        return rho, p, torch.exp(logit.gather(1, logged)) * (1.0 - p) / p

    best: tuple[tuple[int, float], NetworkFit] | None = None
    for penalty in options.penalties:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = SplitNet(context.shape[1], item.shape[-1], options.hidden)
        optimizer = torch.optim.Adam(net.parameters(), lr=options.learning_rate, fused=True)
        for _ in range(options.epochs):
            _, p, pseudo = terms(net(context, item))
            optimizer.zero_grad()
            loss = ((pseudo - weight) ** 2).mean() + penalty * ((p - share) ** 2).mean()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            bound = float(np.log(1e9))  # rho within 1e-9 of 0 and 1
            rho, p, pseudo = terms(net(context, item).clamp(-bound, bound))
        if not torch.isfinite(rho).all():
            continue
        distance = abs(float(p.mean()) - share)
        qualified = distance <= options.tolerance
        key = (0, float(((pseudo - weight) ** 2).mean())) if qualified else (1, distance)
        if best is None or key < best[0]:
            kept = np.ascontiguousarray(rho.numpy()[:, rank])
            best = key, NetworkFit(kept, penalty, qualified)
    if best is None:
        raise OfftowerError("network split: every lambda gave non-finite rho; use the exact fit")
    return best[1]


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
        """(n, A) logits of rho, float64; context (n, d), item (A, e) or (n, A, e)."""
        mixed = self.first_context(context)[:, None, :] + self.first_item(item)
        logit = self.last(torch.relu(self.second(torch.relu(mixed))))
        return torch.squeeze(logit, -1).double()


def _standardized(values: Array) -> Tensor:
    """Of each feature (the last axis), mean 0 and standard deviation 1."""
    rows = tuple(range(values.ndim - 1))
    spread = values.std(axis=rows)
    scaled = (values - values.mean(axis=rows)) / np.where(spread > 0.0, spread, 1.0)
    return torch.from_numpy(scaled).float()
