"""Importance fitting by a small network: the recipe of Udagawa et al. (AAAI 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.errors import OfftowerError
from offtower.evaluation.selection.network_training import FitProblem, SplitNet, Trainer

Array = NDArray[np.float64]


@dataclass(frozen=True)
class NetworkOptions:
    """The published settings: two hidden layers of 100, Adam, whole log per step.

    hidden: units of the two hidden layers. epochs: steps of Adam on the whole log.
    learning_rate: of Adam. penalties: the grid of lambda, upwards. tolerance: how far mean p(x) may
    be from the share for a lambda to qualify.
    whole_grid: fit every lambda, as published. False stops at the first that qualifies: a larger
    one can only fit the weights worse, so with fits that reach their minimum it is the one the
    whole grid would choose.
    precision: of the large products. "bfloat16" is two to three times faster where the processor
    has such instructions; parameters, loss and the result stay in float32 and above.
    """

    hidden: int = 100
    epochs: int = 5000
    learning_rate: float = 1e-3
    penalties: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    tolerance: float = 0.02
    whole_grid: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if not self.penalties or list(self.penalties) != sorted(set(self.penalties)):
            raise OfftowerError(f"penalties must rise, each once, but are {self.penalties}")
        if self.precision not in ("float32", "bfloat16"):
            raise OfftowerError(f"precision is float32 or bfloat16, not {self.precision!r}")
        if self.hidden < 1 or self.epochs < 1 or not self.learning_rate > 0.0:
            raise OfftowerError("hidden and epochs must be at least 1, learning_rate above 0")


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
    weight = (pi_e.gather(1, logged) / pi_b.gather(1, logged)).squeeze(1)
    problem = FitProblem(
        pi_b,
        weight,
        logged[:, 0],
        torch.from_numpy(_standardise(context)).float(),
        _item_inputs(pi_b, pi_e, None if item_features is None else item_features[order]),
    )

    trials: list[PenaltyTrial] = []
    best: tuple[tuple[int, float], float, Array] | None = None
    for penalty in options.penalties:
        rho = _train(problem, penalty, share, options, seed)
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
        if qualified and not options.whole_grid:
            break
    if best is None:
        raise OfftowerError(
            "network split: every lambda of the grid gave non-finite probabilities (weights too "
            "large?). Use method='exact', or a smaller learning rate."
        )
    return NetworkFit(np.ascontiguousarray(best[2]), best[1], tuple(trials))


def _train(
    problem: FitProblem, penalty: float, share: float, options: NetworkOptions, seed: int
) -> torch.Tensor:
    """One network, one penalty: rho (n, A) float64, in the canonical item order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SplitNet(problem.context.shape[1], problem.item.shape[-1], options.hidden)
    trainer = Trainer(net, problem, options.learning_rate, getattr(torch, options.precision))
    for _ in range(options.epochs):
        trainer.step(penalty, share)
    return trainer.rho()


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
