"""Paired differences of two values on the same rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from offtower.errors import DataError
from offtower.evaluation.estimators.base import Estimator
from offtower.evaluation.intervals.linear import LinearFunctional
from offtower.evaluation.intervals.regression import adjusted
from offtower.evaluation.intervals.statistics import Functional, Statistics, collect
from offtower.evaluation.rows import Array, EvaluationRows


@dataclass(frozen=True)
class MeanReward(Estimator):
    """Value of the logging policy itself: the mean reward of the log."""

    label: ClassVar[str] = "mean_reward"
    uses_weight: ClassVar[bool] = False
    consistent: ClassVar[bool] = True

    def terms(self, rows: EvaluationRows) -> Array:
        return rows.reward[:, None]

    def bounds(
        self, reward_range: tuple[float, float], max_weight: float | None
    ) -> tuple[float, float]:
        return reward_range


@dataclass(frozen=True)
class Difference:
    """first - second, from the terms of both side by side: value, error and intervals are paired.

    Two policies by one estimator: Difference(DR(), DR()); a policy and the logging policy:
    Difference(DR(), MeanReward()).
    """

    first: Estimator
    second: Estimator

    @property
    def name(self) -> str:
        return f"{self.first.name} - {self.second.name}"

    def terms(self, first_rows: EvaluationRows, second_rows: EvaluationRows) -> Array:
        """(n, k1 + k2); the rows must be the same rows of the log, seen by two policies."""
        check_aligned(first_rows, second_rows)
        return np.concatenate(
            [self.first.terms(first_rows), self.second.terms(second_rows)], axis=1
        )

    def statistics(
        self,
        first_rows: EvaluationRows,
        second_rows: EvaluationRows,
        *,
        by_user: bool = False,
        replicates: int = 0,
        seed: int = 0,
    ) -> Statistics:
        """Mergeable sums of a shard, for `statistics.finish` and the functions of `intervals`."""
        terms = self.terms(first_rows, second_rows)
        return collect(
            terms,
            first_rows,
            by_user=by_user,
            replicates=replicates,
            seed=seed,
            grouped=bool(self.first.controls or self.second.controls),
        )

    def fitted(self, statistics: Statistics) -> Functional:
        """The difference with the coefficients of least variance of its own, for the controls of
        both estimators; itself without any."""
        cut = self.first.num_terms
        shifted = (
            replace(one, column=cut + one.column, default=-one.default)
            for one in self.second.controls
        )
        controls = (*self.first.controls, *shifted)
        if controls:
            return adjusted(self, controls, statistics)
        if self.first.takes_coefficients or self.second.takes_coefficients:
            return self._of_fitted(statistics)
        return self

    def _of_fitted(self, statistics: Statistics) -> LinearFunctional:
        """Each side with its own coefficients, linearized at the means."""
        mean, cut = statistics.mean, self.first.num_terms
        slope, value = np.empty(mean.size), 0.0
        for side, columns, sign in (
            (self.first, range(cut), 1.0),
            (self.second, range(cut, mean.size), -1.0),
        ):
            own = list(columns)
            functional = side.fitted(statistics.select(own))
            slope[own] = sign * functional.gradient(mean[own])
            value += sign * float(functional.combine(mean[own]))
        return LinearFunctional(self.name, slope, value - float(slope @ mean))

    def combine(self, mean: Array) -> Array:
        cut = self.first.num_terms
        return self.first.combine(mean[..., :cut]) - self.second.combine(mean[..., cut:])

    def gradient(self, mean: Array) -> Array:
        cut = self.first.num_terms
        return np.concatenate([self.first.gradient(mean[:cut]), -self.second.gradient(mean[cut:])])


def check_aligned(first: EvaluationRows, second: EvaluationRows) -> None:
    """Check that two sets of rows are the same rows of the log.

    Raises DataError where their number, row keys, users or rewards differ.
    """
    if first is second:
        return
    if first.n != second.n:
        raise DataError(
            f"a paired difference needs the same rows for both policies; one has {first.n}, the "
            f"other {second.n}"
        )
    for name in ("row", "user", "reward", "row_weight"):
        a, b = getattr(first, name), getattr(second, name)
        if a is not None and b is not None and not np.array_equal(a, b):
            where = int(np.argmax(a != b))
            raise DataError(
                f"a paired difference needs the same rows in the same order for both policies, "
                f"but {name}[{where}] is {a[where]} for one and {b[where]} for the other"
            )
