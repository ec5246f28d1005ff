"""Which candidates are believed first: a later one must show on held-out rows that it is better."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offtower.data.reader import scan
from offtower.prepare import PreparedData

REGRESSIONS = ("regression_linear", "regression")
LIKELIHOODS = ("likelihood_linear", "likelihood")
IMPLICIT = "implicit_linear"
"""Regression reads every row, shown and not rewarded too, and is best where its model can be right;
a linear one has the fewest ways to overfit. The likelihood of rewarded items, weighted by
1 / pscore, needs no model of rewards and pushes items down that the log never shows; it is best
where items are many, rewards rare, and features say little about an item. Implicit squares do the
same and give each id a least-squares problem of its own: where ids are all that is known, better,
if the rank is left to them.
"""

ENOUGH = 50
"""Rewarded rows from which an item is taken to be known by its id."""
_WELL_KNOWN = 0.9
"""Share of the items that have so many, where regressions are believed first."""
_SCAN_ROWS = 65_536
_COUNTED_ROWS = 1 << 20
"""Rows that are counted, at most; a longer log is taken to go on like that."""


def default_order(data: PreparedData) -> tuple[str, ...]:
    """Names in the order of belief.

    What a regression says about an item that the log hardly rewards comes from the item's features.
    An id has none, and what is believed of it there is what its embedding started from; held-out
    values of policies off the log are so noisy that they seldom refute it. Where the log rewards
    all ids often, as it does a few classes, a regression knows them.
    """
    if not _ids_alone(data) or _ids_known(_rewarded_rows(data)):
        return (*REGRESSIONS, *LIKELIHOODS)
    return (IMPLICIT, *LIKELIHOODS, *REGRESSIONS)


def _ids_alone(data: PreparedData) -> bool:
    return all(
        spec.kind == "category"
        and data.item_encoding.cardinality(spec.name) > data.items.num_items / 2
        for spec in data.item_encoding.specs
    )


def _ids_known(rewarded: NDArray[np.float64]) -> bool:
    return float((rewarded >= ENOUGH).mean()) >= _WELL_KNOWN


def _rewarded_rows(data: PreparedData) -> NDArray[np.float64]:
    """(N,) rows of the log in which each item has more than the least reward."""
    least = data.train.schema.reward_range[0]
    counts, seen = np.zeros(data.items.num_items), 0
    for rows in scan(
        data.train,
        data.catalogue,
        data.context_encoding,
        _SCAN_ROWS,
        on_bad_rows=data.on_bad_rows,
        quarantine=data.quarantine_of("train"),
    ):
        counts += np.bincount(rows.action[rows.reward > least], minlength=len(counts))
        seen += len(rows)
        if seen >= _COUNTED_ROWS:
            break
    return counts * (data.train.num_rows / max(seen, 1))
