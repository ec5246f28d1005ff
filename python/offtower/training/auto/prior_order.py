"""The prior order of candidates: a later one must beat an earlier one on held-out rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offtower.prepare import PreparedData

REGRESSIONS = ("regression_linear", "regression")
LIKELIHOODS = ("likelihood_linear", "likelihood")
IMPLICIT = "implicit_linear"
CLONE = "behavior_cloning"

ENOUGH = 50
"""Rewarded rows from which an item counts as well observed."""
_WELL_OBSERVED = 0.9
"""Share of well observed items from which regressions come first."""
_SCAN_ROWS = 65_536
_COUNTED_ROWS = 1 << 20
"""Counts are extrapolated from at most this many rows."""


def prior_order(data: PreparedData) -> tuple[str, ...]:
    """Return candidate names, the preferred ones first.

    Regression uses every row, also those without reward, and is best where its model is well
    specified; the linear one has the fewest ways to overfit. For an item that the log rarely
    rewards, its prediction comes from the item's features. An id has none, so the prediction stays
    near the initial embedding, and held-out values of policies off the log are too noisy to reveal
    that. Therefore regressions come first if items have features or nearly all are well observed.

    Otherwise likelihoods and implicit squares come first. The likelihood of rewarded items,
    weighted by 1 / pscore, needs no reward model and lowers items that the log never shows;
    implicit squares do the same with a least-squares problem per id, which is better for ids at
    high rank.

    The clone of the logging policy ignores rewards and comes last.
    """
    if not _ids_only(data) or _well_observed(_rewarded_rows(data)):
        return (*REGRESSIONS, *LIKELIHOODS, CLONE)
    return (IMPLICIT, *LIKELIHOODS, *REGRESSIONS, CLONE)


def _ids_only(data: PreparedData) -> bool:
    return all(
        spec.kind == "category"
        and data.item_encoding.cardinality(spec.name) > data.items.num_items / 2
        for spec in data.item_encoding.specs
    )


def _well_observed(rewarded: NDArray[np.float64]) -> bool:
    return float((rewarded >= ENOUGH).mean()) >= _WELL_OBSERVED


def _rewarded_rows(data: PreparedData) -> NDArray[np.float64]:
    """(N,) rows of the log in which each item has more than the minimal reward."""
    least = data.train.schema.reward_range[0]
    counts, seen = np.zeros(data.items.num_items), 0
    for rows in data.scan(_SCAN_ROWS):
        counts += np.bincount(rows.action[rows.reward > least], minlength=len(counts))
        seen += len(rows)
        if seen >= _COUNTED_ROWS:
            break
    return counts * (data.train.num_rows / max(seen, 1))
