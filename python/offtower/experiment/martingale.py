"""A betting martingale of the difference between two arms, with one state for any number of rows.

For terms Z_i with mean at most d given the past, and bets 0 <= lambda_i < 1 / (d - min Z) that
depend on the past only, prod_i (1 + lambda_i (Z_i - d)) is a nonnegative supermartingale. By
Ville's inequality it ever exceeds 1 / alpha with probability at most alpha, whatever the number of
looks and whenever the test is stopped. Its growth is largest where lambda is about the effect over
the second moment, lambda_i = (effect) / v_{i-1}; a mixture over effects needs no right one.
Source: Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting";
Howard et al. 2021 for mixtures; Waudby-Smith et al. 2022, "Anytime-valid off-policy inference for
contextual bandits", for the terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from offtower.experiment.assignment import Array, Assignment
from offtower.experiment.bets import Bets

_LARGEST_BET = 0.5
"""A bet loses at most this share of the capital of one effect."""


@dataclass(frozen=True, eq=False)
class Increments:
    """Terms of units, and the center and the second moment that precede each; (..., n)."""

    term: Array
    center: Array
    second_moment: Array


class TermState:
    """Predictable center and second moment of the terms; any leading shape of parallel tests."""

    def __init__(self, assignment: Assignment, shape: tuple[int, ...] = ()) -> None:
        self.assignment = assignment
        low, high = assignment.reward_range
        self.units = 0
        self._reward = np.full(shape, 0.5 * (low + high))
        share = assignment.share
        # The largest variance of rewards in the range, as one earlier unit.
        self._square = np.full(shape, 0.25 * assignment.width**2 / (share * (1.0 - share)))
        self.total = np.zeros(shape)
        self.square = np.zeros(shape)

    def take(self, reward: Array, new: NDArray[np.bool_]) -> Increments:
        """Terms of the next units, in their order."""
        n = reward.shape[-1]
        count = self.units + np.arange(1.0, n + 1.0)
        sums = self._reward[..., None] + np.cumsum(reward, axis=-1)
        center = (sums - reward) / count
        term = self.assignment.terms(reward, new, center)
        squares = self._square[..., None] + np.cumsum(term**2, axis=-1)
        moment = (squares - term**2) / count
        self._reward, self._square = sums[..., -1], squares[..., -1]
        self.total = self.total + term.sum(axis=-1)
        self.square = self.square + (term**2).sum(axis=-1)
        self.units += n
        return Increments(term, center, moment)

    @property
    def estimate(self) -> Array:
        """Mean of the terms: the difference of the arms."""
        return np.asarray(self.total / max(self.units, 1))

    @property
    def std_error(self) -> Array:
        """Of `estimate`."""
        n = max(self.units, 1)
        return np.asarray(np.sqrt(np.maximum(self.square / n - self.estimate**2, 0.0) / n))


class DifferenceMartingale:
    """Evidence against "the difference is at most `margin`", or at least, of any number of tests.

    Args:
        assignment: bounds the terms.
        bets: effects beyond the margin.
        margin: one number, or (..., D) several that are tested at once.
        sign: 1 for evidence that the difference is larger, -1 that it is smaller.
    """

    def __init__(
        self, assignment: Assignment, bets: Bets, margin: float | Array, sign: float = 1.0
    ) -> None:
        self.margin, self.sign, self.bets = np.asarray(margin, dtype=np.float64), sign, bets
        self._assignment = assignment
        self._farthest = float(np.abs(self.margin).max())
        self._log_capital: Array = np.broadcast_to(bets.log_weight, (1, bets.log_weight.size))
        self.best = -np.inf
        """Largest log evidence after any unit so far (at any of the ends, for `add_total`)."""

    def add(self, increments: Increments) -> Array:
        """(..., n) log evidence after each of the next units, against one margin."""
        bet = self._bets(increments)
        gain = self.sign * (increments.term - self.margin)
        path = np.cumsum(np.log1p(bet * gain[..., None]), axis=-2)
        path = path + self._carried(path.shape)
        self._log_capital = path[..., -1:, :]
        evidence = np.asarray(logsumexp(path, axis=-1))
        self.best = np.maximum(self.best, evidence.max(axis=-1))
        return evidence

    def _bets(self, increments: Increments) -> Array:
        """(..., n, J) the share of each effect's capital that is put on each unit."""
        reach = self._assignment.reach(increments.center, self.sign) + self._farthest
        bet = self.bets.effect / increments.second_moment[..., None]
        return np.minimum(bet, _LARGEST_BET / reach[..., None])

    def _carried(self, shape: tuple[int, ...]) -> Array:
        return np.broadcast_to(self._log_capital, (*shape[:-2], 1, shape[-1]))

    def add_total(self, increments: Increments) -> Array:
        """(D,) log evidence after all of the next units of one test, against each margin."""
        bet = self._bets(increments)
        gains = [
            np.log1p(bet * (self.sign * (increments.term - margin))[:, None]).sum(axis=0)
            for margin in self.margin
        ]
        self._log_capital = self._log_capital + np.array(gains)
        evidence = np.asarray(logsumexp(self._log_capital, axis=-1))
        self.best = np.maximum(self.best, evidence)
        return evidence
