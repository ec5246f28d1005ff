"""What a retriever answers: found or drawn items, context by context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from offtower.retrieval.propensity_sampler import Mode

IntArray = NDArray[np.int64]
OnEmpty = Literal["error", "skip"]
"""What happens to a context that may be shown no item: refuse the call, or show nothing."""


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The k best items of n contexts."""

    item_id: list[list[Any]]
    """Per context, best first; shorter than k if filters or the index leave fewer."""
    item: list[IntArray]
    """Per context, item numbers in the catalogue."""
    score: list[NDArray[np.float32]]
    """Per context, logits <u, v_a> / temperature + b_a."""


@dataclass(frozen=True, eq=False)
class SampleResult:
    """Drawn items of n contexts, k each, or all that may be shown where these are fewer."""

    item_id: list[list[Any]]
    """Per context."""
    item: IntArray
    """(n, k) item numbers; -1 beyond the last position of a shorter slate."""
    pscore: NDArray[np.float64]
    """(n, k); in a slate, conditional on the positions before. NaN, as in the next two, beyond the
    last position."""
    relative_error: NDArray[np.float64]
    """(n, k) standard error of pscore as a share of it; 0 if pscore is exact."""
    conditional_pscore: NDArray[np.float64]
    """(n, k) exact probability given the sampled rows; see `retrieval.propensity_sampler`."""
    slate: bool
    version: str
    mode: Mode
    policy: str
    """Name of the policy for the log: the export's version, and `serving` where it was changed."""
    excluded: list[IntArray] | None = None
    """Per context, item numbers that the call left out, for the log; None where it named none."""

    @property
    def lengths(self) -> IntArray:
        """(n,) items of each context; 0 where no item may be shown (`on_empty`)."""
        return np.asarray((self.item >= 0).sum(axis=1), dtype=np.int64)


def padded(rows: Sequence[NDArray[Any] | None], k: int, fill: int | float) -> NDArray[Any]:
    """(n, k) of rows of at most k numbers; None is a row without any."""
    out = np.full((len(rows), k), fill)
    for row, values in zip(out, rows, strict=True):
        if values is not None:
            row[: len(values)] = values
    return out
