"""Coverage of items and calibration of propensities, accumulated over the batches of a log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.data.rows import EncodedRows
from offtower.evaluation.decision.pscore_calibration import PscoreCalibration, pscore_calibration
from offtower.evaluation.scoring.policy import ScoredRows

PROBED_ROWS = 500
PROBED_DRAWS = 20
CALIBRATION_ROWS = 100_000
"""Rows whose propensities are calibrated: evenly spaced ones of a longer log."""


@dataclass(frozen=True)
class ItemCoverage:
    """How much of what a policy would show the log has never shown.

    Attributes:
        draws: items drawn from the policy in contexts of the log.
        unlogged: share of them that the log shows nowhere.
        logging_unlogged: the share that is expected of the logging policy itself, by Good and
            Turing: items seen once, over the rows.
        perplexity: exp of the policy's mean entropy, from the draws: the number of equally likely
            items that explore as much.
    """

    draws: int
    unlogged: float
    logging_unlogged: float
    perplexity: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class CoverageAccumulator:
    """Item counts, propensities, and items drawn from each policy on the log's first batch.

    num_items: of the catalogue. num_rows: of the log.
    """

    def __init__(self, num_items: int, num_rows: int, seed: int) -> None:
        # How often each item was shown; 2 stands for more, so that one byte an item is enough.
        self._seen = np.zeros(num_items, dtype=np.uint8)
        self._rows = 0
        self._stride = max(1, -(-num_rows // CALIBRATION_ROWS))
        self._pscore: list[NDArray[np.float64]] = []
        self._action: list[NDArray[np.int64]] = []
        self._drawn: dict[str, NDArray[np.int64]] = {}
        self._entropy: dict[str, float] = {}
        self._seed = seed

    def add(self, rows: EncodedRows) -> None:
        """Add a batch."""
        item, times = np.unique(rows.action, return_counts=True)
        self._add_seen(item, np.minimum(times, 2).astype(np.uint8))
        self._rows += len(rows)
        assert rows.pscore is not None
        taken = rows.row % self._stride == 0
        if rows.pscore_kind == "slate" or rows.row_weight is not None:
            return  # Bounds on a mean of 1 / pscore have no form for rows with weights.
        if rows.eligible is not None:
            return  # A group's mass is then the rows' mean number of its eligible items, not 1.
        if rows.position is not None and rows.pscore_kind == "conditional":
            taken = rows.position == 0  # Only there it is the probability of a single draw.
        self._pscore.append(rows.pscore[taken])
        self._action.append(rows.action[taken])

    def probe(self, policy: str, scored: ScoredRows) -> None:
        """Draw items from a policy on a batch, the log's first."""
        scorer = scored.scorer
        context = scored.context_embedding[:PROBED_ROWS]
        drawn, log_prob = scorer.served.draw(
            context,
            scorer.items,
            PROBED_DRAWS,
            torch.Generator().manual_seed(self._seed),
            scored.eligible_at(np.arange(len(context))),
        )
        self._drawn[policy] = drawn.numpy().reshape(-1)
        self._entropy[policy] = -float(log_prob.double().mean())

    def merge(self, later: CoverageAccumulator) -> None:
        """Add what was accumulated on later rows."""
        item = np.flatnonzero(later._seen)
        self._add_seen(item, later._seen[item])
        self._rows += later._rows
        self._pscore += later._pscore
        self._action += later._action
        self._drawn = {**later._drawn, **self._drawn}
        self._entropy = {**later._entropy, **self._entropy}

    def _add_seen(self, item: NDArray[np.int64], times: NDArray[np.uint8]) -> None:
        self._seen[item] = np.minimum(self._seen[item] + times, 2)

    def __getstate__(self) -> dict[str, Any]:
        """Send only the items that were seen."""
        item = np.flatnonzero(self._seen)
        return {**self.__dict__, "_seen": (self._seen.size, item, self._seen[item])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        size, item, times = state.pop("_seen")
        self.__dict__.update(state)
        self._seen = np.zeros(size, dtype=np.uint8)
        self._seen[item] = times

    def coverage(self) -> dict[str, ItemCoverage]:
        """By policy."""
        own = float(np.count_nonzero(self._seen == 1)) / max(1, self._rows)
        return {
            name: ItemCoverage(
                drawn.size,
                float(np.mean(self._seen[drawn] == 0)),
                own,
                float(np.exp(self._entropy[name])),
            )
            for name, drawn in self._drawn.items()
        }

    def calibration(self) -> PscoreCalibration | None:
        """Of the logged propensities; None for a log of one row."""
        pscore = np.concatenate([np.zeros(0), *self._pscore])
        if pscore.size < 2:
            return None
        return pscore_calibration(pscore, np.concatenate(self._action), self._seen.size)


def coverage_notes(
    coverage: Mapping[str, ItemCoverage], calibration: PscoreCalibration | None
) -> list[str]:
    """Warnings for the reader of the report."""
    notes = []
    for name, one in coverage.items():
        if one.unlogged > 0.01 + 2.0 * one.logging_unlogged:
            notes.append(
                f"{100 * one.unlogged:.2g} % of the items that {name} would show never appear in "
                f"this log ({100 * one.logging_unlogged:.2g} % for the logging policy): for them "
                "the estimates rely on the reward model alone"
            )
    if calibration is not None and not calibration.ok:
        bad = [group for group in calibration.groups if not group.ok]
        notes.append(
            f"the logged propensities are inconsistent: the inverse propensities of {len(bad)} of "
            f"{len(calibration.groups)} groups of items have a mass of {bad[0].mass:.3g} where 1 "
            "is expected"
        )
    return notes
