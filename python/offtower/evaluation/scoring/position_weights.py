"""Weights of positions: the value of a round is sum_k alpha_k r_k."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError, DataError
from offtower.evaluation.rows import Array


@dataclass(frozen=True)
class PositionWeights:
    """Weights alpha_k of the positions of a slate, from the top.

    values: at least one, finite and not negative, not all 0; a log has no position beyond them.

    Raises:
        ConfigError: other values.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        alpha = np.asarray(self.values, dtype=np.float64)
        if not (alpha.size and np.isfinite(alpha).all() and (alpha >= 0.0).all() and alpha.any()):
            raise ConfigError(
                "evaluation.position_weights must be finite numbers of at least 0, not all 0, one "
                f"for each position from the top, but are {list(self.values)}"
            )

    def of(self, rows: EncodedRows) -> Array:
        """(n,) weights of the rows' positions.

        Raises:
            DataError: a position has no weight.
        """
        assert rows.position is not None, "the caller checks that the log has positions"
        if rows.position.size and (last := int(rows.position.max())) >= len(self.values):
            raise DataError(
                f"the log has position {last}, and evaluation.position_weights has only "
                f"{len(self.values)} numbers: give one for each position (0 leaves its rewards out)"
            )
        return np.asarray(self.values, dtype=np.float64)[rows.position]

    def applied(self, rows: EncodedRows) -> EncodedRows:
        """The rows with their rewards times the weights of their positions."""
        alpha = self.of(rows)
        named = None if rows.rewards is None else rows.rewards * alpha[:, None]
        reward = (rows.reward * alpha).astype(np.float32)
        return replace(rows, reward=reward, rewards=named)

    def range(self, reward_range: tuple[float, float]) -> tuple[float, float]:
        """Least and largest weighted reward of a position."""
        ends = np.outer(self.values, reward_range)
        return float(ends.min()), float(ends.max())

    @property
    def note(self) -> str:
        """For the reader of a report."""
        listed = ", ".join(f"{one:.3g}" for one in self.values)
        return f"rewards count by position: {listed} from the top (evaluation.position_weights)"
