"""The largest weight 1 / pscore of a likelihood, by what it leaves of the log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from offtower.data.rows import EncodedRows

MOST = 100.0
"""No weight is larger."""
LEFT = 0.5
"""Share of the rewarded rows that the effective sample size shall be."""


class WeightSample:
    """Rewards and propensities of rows that are read for another purpose."""

    def __init__(self) -> None:
        self._reward: list[NDArray[np.float64]] = []
        self._inverse: list[NDArray[np.float64]] = []

    def watch(self, parts: Iterable[EncodedRows]) -> Iterator[EncodedRows]:
        """The same rows; the rewarded ones are noted as they pass."""
        for rows in parts:
            rewarded = rows.reward > 0.0
            if rows.pscore is not None:
                self._reward.append(rows.reward[rewarded].astype(np.float64))
                self._inverse.append(1.0 / rows.pscore[rewarded])
            yield rows

    def limit(self) -> float:
        """See `weight_limit`; MOST where no rewarded row has passed."""
        if not self._reward:
            return MOST
        return weight_limit(np.concatenate(self._inverse), np.concatenate(self._reward))


def weight_limit(inverse: NDArray[np.float64], reward: NDArray[np.float64]) -> float:
    """Largest c in [1, MOST] at which min(1 / pscore, c) r has an effective sample of LEFT of all.

    The effective sample size (sum w)^2 / sum w^2 (Kish 1965) falls as c grows. Of a log where a few
    rewarded rows are rare choices of its policy, 1 / pscore makes those few nearly all of it.

    Args:
        inverse: (n,) 1 / pscore of rewarded rows. reward: (n,) above 0.
    """

    def left(c: float) -> float:
        weight = np.minimum(inverse, c) * reward
        return float(weight.sum() ** 2 / (len(weight) * np.square(weight).sum()))

    if len(inverse) == 0 or left(MOST) >= LEFT:
        return MOST
    low, high = 0.0, np.log(MOST)
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if left(np.exp(middle)) >= LEFT else (low, middle)
    return float(np.exp(low))
