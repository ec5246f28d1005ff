"""The base measure of policies that tilt the log's item frequencies by scores.

The frequency of an item under the logging policy, P(a) = E_x[pi_0(a|x)], has two estimates. Of n
rows, n_a show the item, and its share n_a / n has the relative variance 1 / n_a. Rows that show the
item also hold its propensities, and E[1 / pi_0(a|x) | a] = 1 / P(a), so the harmonic mean of these
is another estimate. Its relative variance is C^2 / n_a, with the coefficient of variation C of
1 / pscore between rows of one item. It is exact where propensities do not depend on the context, as
in logs by popularity. The base is the geometric mean of both, weighted by inverse variances.

Items without rows share what the others leave, estimated likewise: one minus the sum of the
harmonic means, and the share of items with one row (Good 1953, "The population frequencies of
species and the estimation of population parameters").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.data.rows import EncodedRows
from offtower.training.auto.folds import Folds

_MOST_ROWS = 1 << 24
"""In memory, at most: the first ones of the log."""
_LEAST_ROWS = 1e-2
"""Of an item without rows, at least."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LoggedItems:
    """Which items n rows show, and how."""

    action: NDArray[np.int64]
    """(n,) index of the item."""
    pscore: NDArray[np.float32]
    """(n,)."""
    fold: NDArray[np.int8]
    """(n,) of each row."""

    @classmethod
    def of(cls, parts: Iterable[EncodedRows], folds: Folds) -> LoggedItems:
        """Take the first rows of a log."""
        action, pscore, fold, seen = [], [], [], 0
        for rows in parts:
            assert rows.pscore is not None, "auto requires propensities"
            action.append(np.asarray(rows.action, dtype=np.int64))
            pscore.append(rows.pscore.astype(np.float32))
            fold.append(folds.of(rows))
            seen += len(rows)
            if seen >= _MOST_ROWS:
                break
        return cls(np.concatenate(action), np.concatenate(pscore), np.concatenate(fold))

    def without(self, fold: int) -> LoggedItems:
        """The rows outside of a fold."""
        kept = self.fold != fold
        if kept.all():
            return self
        return LoggedItems(self.action[kept], self.pscore[kept], self.fold[kept])


def log_base_measure(value: NDArray[np.int64], pscore: Array, size: int) -> Array:
    """Estimate the logarithms of items' frequencies under the logging policy.

    Args:
        value: (n,) item of each row, from 0 to `size` - 1.
        pscore: (n,).
        size: number of items.

    Returns:
        (size,) log P(a); probabilities sum to about 1.
    """
    rows, inverse = len(value), np.reciprocal(pscore.astype(np.float64))
    count = np.bincount(value, minlength=size).astype(np.float64)
    total = np.bincount(value, weights=inverse, minlength=size)
    seen = count > 0.0
    number = count[seen]
    harmonic = number / total[seen]
    square = np.bincount(value, weights=inverse**2, minlength=size)[seen] * harmonic**2
    # (n_a - 1) C^2 of each item; rounding of equal propensities is no variance.
    repeated = max(float((number - 1.0).sum()), 1.0)
    variance = float(np.maximum(square - number, 0.0).sum()) / repeated
    by_propensities = 1.0 / (1.0 + variance)
    base = harmonic**by_propensities * (number / rows) ** (1.0 - by_propensities)
    unseen = size - len(number)
    if unseen == 0:
        return np.asarray(np.log(base / base.sum()), dtype=np.float64)
    single = float(np.count_nonzero(number == 1.0)) / rows
    left = by_propensities * max(0.0, 1.0 - float(harmonic.sum())) + (1 - by_propensities) * single
    left = min(max(left, unseen * _LEAST_ROWS / rows), 0.5)
    result = np.full(size, np.log(left / unseen))
    result[seen] = np.log(base * ((1.0 - left) / base.sum()))
    return result
