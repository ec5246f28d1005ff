"""Bets on a difference: which effects a martingale is to find quickly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from offtower.errors import ConfigError

Array = NDArray[np.float64]

_PRIOR_POINTS = 12
_WIDE = 2.0 ** np.arange(3, -6, -1)
"""Multiples of the prior's scale that are bet on too, in case it is wrong."""
_UNKNOWN = 2.0 ** -np.arange(2, 18)
"""Shares of the range of rewards that are bet on where nothing is known."""
_TRUST = 0.8
"""Weight of the prior in the mixture; a wrong one costs at most log(1 / 0.2) = 1.6 of evidence."""


@dataclass(frozen=True, eq=False)
class Bets:
    """A mixture over effects above the margin, fixed before the first unit is seen.

    The mixture decides how soon an effect is found, never how often a false one is: every fixed
    mixture of martingales is a martingale.

    Attributes:
        effect: (J,) positive distances from the margin.
        log_weight: (J,) logarithms of their weights, which sum to 1.
    """

    effect: Array
    log_weight: Array

    @classmethod
    def unknown(cls, width: float) -> Bets:
        """Equal weights on effects from a quarter of the range of rewards downwards."""
        weight = np.full(_UNKNOWN.size, -float(np.log(_UNKNOWN.size)))
        return cls(np.asarray(width * _UNKNOWN, dtype=np.float64), weight)

    @classmethod
    def around(cls, effect: float, std_error: float) -> Bets:
        """Quantiles of the normal prior that lie above the margin, and some much wider.

        Args:
            effect: distance of the offline estimate, or of the effect to detect, from the margin.
            std_error: of the estimate, with what may differ online.

        Raises:
            ConfigError: the standard error is not positive.
        """
        if not std_error > 0.0:
            raise ConfigError(f"the standard error of a prior must be positive, got {std_error:g}")
        below = norm.cdf(-effect / std_error)
        at = below + (1.0 - below) * (np.arange(_PRIOR_POINTS) + 0.5) / _PRIOR_POINTS
        quantile = effect + std_error * norm.ppf(np.minimum(at, 1.0 - 1e-12))
        scale = max(abs(effect), std_error)
        points = np.concatenate([np.maximum(quantile, 1e-3 * scale), scale * _WIDE])
        weights = [_TRUST / _PRIOR_POINTS] * _PRIOR_POINTS
        weights += [(1.0 - _TRUST) / _WIDE.size] * _WIDE.size
        return cls(points, np.log(weights))
