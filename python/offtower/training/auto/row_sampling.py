"""Two-phase sampling of held-out rows: approximate terms of all, exact ones of a sample.

Exact terms of a row take a pass over the catalogue. With few of them, a uniform sample has hardly
any of the rows that decide: those with a large weight under a policy that is better than the
logging policy. So a first phase computes terms of all rows with normalizers from a sample of the
items, and rows are drawn by these. They enter estimates through the probabilities of drawing
alone, so that errors of the first phase cost efficiency and no validity.

With contributions e_ip of row i to the estimated value of policy p, a draw with probability pi_i
has the variance sum_i e_ip^2 / pi_i, of rows and sampling together. Its ratio to the variance of
all rows, sum_i e_ip^2, summed over policies, is least for pi_i proportional to
sqrt(sum_p e_ip^2 / sum_j e_jp^2) (Neyman 1938, "Contribution to the theory of sampling human
populations"). A share of uniform draws bounds the rows that one stands for.

Rows are drawn in the order of u_i / size_i with uniform u_i, keyed by the row. Given the value t of
the first row that is not drawn, a row has the probability min(1, size_i t) (priority sampling,
Duffield, Lund and Thorup 2007), so a sample can be continued, and has a fixed number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from offtower.data.order import keyed_hash
from offtower.training.auto.held_out import HeldOutTerms

_UNIFORM = 0.25
"""Share of the sizes that does not depend on the first phase."""
_COVERAGE = 0.5
"""Of the policy's expected reward: residual for which each weight counts."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ItemSample:
    """Items whose weighted sums approximate those over the catalogue of N items."""

    item: Tensor
    """(m,) distinct, on the CPU."""
    weight: Tensor
    """(m,) float32 number of items that each one stands for."""
    weight_of: Tensor
    """(N,) float32; 0 for items outside of the sample."""

    @classmethod
    def of(cls, logged: NDArray[np.int64], number: int, size: int, seed: int) -> ItemSample:
        """Take the items that the log shows most, which are most of what learned policies play, and
        draw others.

        Args:
            logged: items of rows.
            number: N.
            size: m, at most N.
        """
        size = min(size, number)
        counts = np.bincount(logged, minlength=number)
        order = np.argsort(-counts, kind="stable")
        head, tail = order[: size // 2], order[size // 2 :]
        drawn = np.random.default_rng(seed).choice(len(tail), size - len(head), replace=False)
        item = torch.from_numpy(np.concatenate([head, tail[drawn]]))
        weight = torch.ones(size)
        weight[len(head) :] = len(tail) / max(size - len(head), 1)
        weight_of = torch.zeros(number)
        weight_of[item] = weight
        return cls(item, weight, weight_of)

    def log_prob(self, log_prob: Tensor, action: Tensor) -> Tensor:
        """(T, B) log probabilities of items (B,), which count as themselves, not as those that they
        stand for, from logits less the logarithm of the sum over the sample."""
        weight = self.weight_of[action].to(log_prob)
        # The sum without the item; a weight of 0 means that it is not in the sum.
        others = torch.clamp(1.0 - weight * log_prob.clamp(max=0.0).exp(), min=0.0)
        return log_prob - torch.logaddexp(others.log(), log_prob)


def squared_contribution(terms: HeldOutTerms, residual: Array) -> Array:
    """(n,) squared contributions of rows to the doubly robust estimate of a policy's value.

    Weights count beyond their residuals, since the estimate of the covered share needs them.
    """
    mean = float(terms.expected_reward.mean())
    found = np.square(terms.weight) * (np.square(residual) + (_COVERAGE * mean) ** 2)
    found += np.square(terms.expected_reward - mean)
    return np.asarray(found, dtype=np.float64)


def row_sizes(square: Array, rewarded: NDArray[np.bool_]) -> Array:
    """(n,) positive sizes to which probabilities are proportional; their sum is 1.

    Args:
        square: (n, policies) squared contributions.
        rewarded: (n,) whether the reward is not 0: these rows have half of the uniform draws.
    """
    total = square.sum(axis=0)
    share = np.sqrt((square / np.where(total > 0.0, total, 1.0)).sum(axis=1))
    numbers = np.array([np.count_nonzero(~rewarded), np.count_nonzero(rewarded)])
    uniform = 1.0 / (numbers * np.count_nonzero(numbers))[rewarded.astype(np.int64)]
    if not share.sum() > 0.0:
        return np.asarray(uniform, dtype=np.float64)
    found: Array = (1.0 - _UNIFORM) * share / share.sum() + _UNIFORM * uniform
    return found


@dataclass(frozen=True)
class RowOrder:
    """The order in which rows are drawn."""

    size: Array
    """(n,)."""
    order: NDArray[np.int64]
    """(n,) rows, the first one first."""
    priority: Array
    """(n,) u / size of each row."""

    @classmethod
    def of(cls, size: Array, key: ArrayLike, seed: int) -> RowOrder:
        """Order rows with sizes (n,) and keys (n,)."""
        uniform = (keyed_hash(key, seed).astype(np.float64) + 0.5) / 2.0**64
        priority = uniform / size
        return cls(size, np.argsort(priority, kind="stable"), priority)

    def count(self, size: Array, drawn: int) -> Array:
        """Number of rows that each row of these sizes stands for, among the first `drawn`."""
        if drawn >= len(self.order):
            return np.ones(len(size))
        threshold = self.priority[self.order[drawn]]
        return np.asarray(np.maximum(1.0, 1.0 / (size * threshold)), dtype=np.float64)
