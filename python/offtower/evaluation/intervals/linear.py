"""Linear functionals of the means of per-row terms, with fixed coefficients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offtower.evaluation.rows import Array


@dataclass(frozen=True, eq=False)
class LinearFunctional:
    """constant + slope . means: an estimator whose coefficients the sums have chosen.

    error_factor: by which the standard error of fixed coefficients grows for their estimation.
    """

    name: str
    slope: Array
    constant: float = 0.0
    error_factor: float = 1.0

    def combine(self, mean: Array) -> Array:
        """(..., k) means -> (...) values."""
        return np.asarray(mean @ self.slope + self.constant)

    def gradient(self, mean: Array) -> Array:
        """(k,) slope."""
        return self.slope
