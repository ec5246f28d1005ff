"""Histories of a simulated world, on which its rewards depend.

A context's factor of z is the sum of what its features and its history give, each with its share of
the variance. The history gives M h, with a fixed random M and h the weighted sum of the factors of
its items, of unit variance: the newest event has weight 1, and the weight of an event halves with
every `half_life` later ones. Which items a history has is drawn uniformly, so that nothing but the
history itself shows h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import list_parts
from offtower.data.schema import FeatureSpec
from offtower.errors import ConfigError

HISTORY, HISTORY_TIMES = "history", "history_times"
_MEAN_GAP = 3600.0
"""Seconds between events, on average."""


@dataclass(frozen=True)
class HistorySettings:
    """Histories of a world's contexts.

    Attributes:
        length: most items of a history; each number from 0 is equally likely.
        share: of the variance of a context's factor that its history gives.
        half_life: events after which an event's weight is halved.
    """

    length: int = 10
    share: float = 0.8
    half_life: float = 2.0

    def __post_init__(self) -> None:
        if self.length < 1 or not 0.0 < self.share <= 1.0 or not self.half_life > 0.0:
            raise ConfigError(
                "histories need a length of at least 1, a share in (0, 1] and a positive half "
                f"life, got {self.length}, {self.share} and {self.half_life}"
            )


class Histories:
    """Draws histories and computes what they give.

    Args:
        settings: their length and weights.
        item_ids: of the world.
        item_factor: (N, L) float64.
        scale: standard deviation of z's interaction.
        rng: source of the map M.
    """

    def __init__(
        self,
        settings: HistorySettings,
        item_ids: pa.Array,
        item_factor: NDArray[np.float64],
        scale: float,
        rng: np.random.Generator,
    ) -> None:
        self.settings = settings
        self._ids = item_ids
        latent = item_factor.shape[1]
        self._standard = (item_factor - item_factor.mean(axis=0)) / item_factor.std(axis=0)
        map_size = scale / latent
        self._map = map_size * rng.standard_normal((latent, latent))

    @property
    def spec(self) -> FeatureSpec:
        """The feature, as a schema lists it."""
        return FeatureSpec(
            name=HISTORY, kind="history", length=self.settings.length, times=HISTORY_TIMES
        )

    def columns(
        self, times: NDArray[np.datetime64], rng: np.random.Generator
    ) -> dict[str, pa.Array]:
        """Draw the histories of rows with these times, whose events lie before them."""
        lengths = rng.integers(0, self.settings.length + 1, size=len(times))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        items = rng.integers(len(self._ids), size=int(offsets[-1]))
        gaps = 1.0 + np.floor(rng.exponential(_MEAN_GAP, size=int(offsets[-1])))
        # The age of an event is the sum of the gaps from it to the row.
        total = np.concatenate([[0.0], np.cumsum(gaps)])
        age = np.repeat(total[offsets[1:]], lengths) - total[:-1]
        at = np.repeat(times.astype("datetime64[us]"), lengths) - age.astype("timedelta64[s]")
        ends = pa.array(offsets, pa.int32())
        return {
            HISTORY: pa.ListArray.from_arrays(ends, self._ids.take(pa.array(items))),
            HISTORY_TIMES: pa.ListArray.from_arrays(ends, pa.array(at)),
        }

    def factor(self, contexts: pa.Table) -> NDArray[np.float64]:
        """(B, L) that the histories of contexts give to z; zeros for empty ones."""
        ids, offsets = list_parts(contexts.column(HISTORY))
        items = pc.index_in(ids, value_set=self._ids).to_numpy(zero_copy_only=False)
        row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        later = offsets[1:][row] - 1 - np.arange(len(items))
        weight = 0.5 ** (later / self.settings.half_life)
        square = np.bincount(row, weight**2, minlength=len(offsets) - 1)
        total = np.zeros((len(offsets) - 1, self._standard.shape[1]))
        np.add.at(total, row, weight[:, None] * self._standard[items.astype(np.int64)])
        unit = total / np.sqrt(np.maximum(square, 1e-12))[:, None]
        given: NDArray[np.float64] = unit @ self._map.T
        return given
