"""Calibration of a reward model's predictions, as sums that merge over shards."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from offtower.evaluation.intervals.statistics import Statistics, collect, standard_error
from offtower.evaluation.intervals.term_mean import TermMean
from offtower.evaluation.rows import Array, EvaluationRows


@dataclass(frozen=True)
class CalibrationBin:
    """Rows of similar prediction: number, mean prediction, mean reward, its standard error.

    std_error: None for a single row.
    """

    n: int
    predicted: float
    observed: float
    std_error: float | None


@dataclass(frozen=True)
class Calibration:
    """The reward model's predictions of the logged rewards.

    Attributes:
        bias, bias_std_error: mean of r - q over the log.
        weighted_bias: sum w (r - q) / sum w: the bias on the items that the target policy shows.
        slope: least-squares slope of r on q; 1 for a calibrated model, None for a constant one.
        error: mean absolute distance of prediction and reward over the bins.
        bins: about ten of equal size, by increasing prediction.
    """

    n: int
    bias: float
    bias_std_error: float
    weighted_bias: float | None
    slope: float | None
    error: float
    bins: tuple[CalibrationBin, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bins": [asdict(one) for one in self.bins]}


@dataclass(frozen=True, eq=False)
class CalibrationSums:
    """Mergeable sums by prediction, rounded to 8 bits of mantissa (0.4 %).

    key (g,): the rounded predictions. sums (g, 5): rows, q, r, r^2, w (r - q), each times the row's
    weight where rows have weights.
    pair: statistics of (r - q, q, r).
    """

    key: Array
    sums: Array
    pair: Statistics

    @classmethod
    def of(cls, rows: EvaluationRows) -> CalibrationSums | None:
        """Sums over a shard, by row; None without a reward model."""
        rows = rows.by_row()
        q, r = rows.action_reward, rows.reward
        if q is None:
            return None
        bits = np.ascontiguousarray(q, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        columns = [np.ones_like(r), q, r, r * r, rows.importance_weight * (r - q)]
        if rows.row_weight is not None:
            columns = [rows.row_weight * column for column in columns]
        pair = collect(np.stack([r - q, q, r], axis=1), rows)
        return cls(
            *_by_key(bits.view(np.float32).astype(np.float64), np.stack(columns, axis=1)), pair
        )

    def merge(self, other: CalibrationSums) -> CalibrationSums:
        """Sums over both shards."""
        key, sums = _by_key(
            np.concatenate([self.key, other.key]), np.concatenate([self.sums, other.sums])
        )
        return CalibrationSums(key, sums, self.pair.merge(other.pair))

    def finish(self, bins: int = 10) -> Calibration:
        """The calibration, its keys gathered into `bins` bins of about equal size."""
        n = self.pair.n
        by_key = self.sums
        if self.pair.row_weights is not None:  # Weights of mean 1, so that bins count rows.
            by_key = by_key * (n / self.pair.count)
        place = np.cumsum(by_key[:, 0]) - 0.5 * by_key[:, 0]
        group = np.minimum((place * bins / max(n, 1)).astype(np.int64), bins - 1)
        _, sums = _by_key(group.astype(np.float64), by_key)
        made = tuple(_bin(row) for row in sums)
        scatter = self.pair.scatter
        weight_sum = self.pair.weight_sum
        return Calibration(
            n=n,
            bias=float(self.pair.mean[0]),
            bias_std_error=standard_error(TermMean(0, 3), self.pair),
            weighted_bias=float(self.sums[:, 4].sum()) / weight_sum if weight_sum > 0.0 else None,
            slope=float(scatter[1, 2] / scatter[1, 1]) if scatter[1, 1] > 1e-14 * n else None,
            error=sum(b.n * abs(b.observed - b.predicted) for b in made) / n,
            bins=made,
        )


def _bin(row: Array) -> CalibrationBin:
    n, q, r, square, _ = row.tolist()
    variance = max(0.0, square / n - (r / n) ** 2)
    return CalibrationBin(int(n), q / n, r / n, math.sqrt(variance / (n - 1)) if n > 1 else None)


def _by_key(key: Array, columns: Array) -> tuple[Array, Array]:
    unique, where = np.unique(key, return_inverse=True)
    sums = [np.bincount(where, column, minlength=unique.size) for column in columns.T]
    return unique, np.stack(sums, axis=1)
