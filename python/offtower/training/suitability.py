"""Notes before training: objectives and schedules that cannot learn from a log."""

from __future__ import annotations

from collections.abc import Iterator

from offtower.config import Config
from offtower.objectives import Objective
from offtower.prepare import PreparedData
from offtower.training.auto.prior_order import ids_only
from offtower.training.auto.rewarded_rows import RewardedRows

_ROWS_PER_ITEM = 10.0
"""Rewarded rows of the median item below which ids are too rarely rewarded for an objective that
learns from each item's own rows."""
_STEPS = 100
_BATCHES = 16
"""Batches of an epoch that the proposed batch size makes of a small log."""
_PROPOSED_STEPS = 400


def suitability_notes(config: Config, objective: Objective, data: PreparedData) -> Iterator[str]:
    """Yield one sentence, with a remedy, for each reason why the configured training may fail.

    Reads at most the first million rows of the training log.
    """
    rows, training = data.train.num_rows, config.training
    steps = training.epochs * -(-rows // training.batch_size)
    if steps < _STEPS:
        batch = min(training.batch_size, max(32, rows // _BATCHES))
        epochs = -(-_PROPOSED_STEPS // -(-rows // batch))
        yield (
            f"training.epochs={training.epochs} of {rows:,} rows are only {steps} steps of "
            f"{training.batch_size} rows: set training.batch_size={batch} and "
            f"training.epochs={epochs}, or use objective.name=auto, which chooses both"
        )
    if objective.name in _OF_EACH_ITEM and ids_only(data):
        counts = RewardedRows.of(data).counts
        items, often = len(counts), int((counts >= _ROWS_PER_ITEM).sum())
        if often < items / 2:
            yield (
                f"objective '{objective.name}' learns each item from its own rewarded rows, and "
                f"{items - often:,} of {items:,} items, known by their ids only, have fewer than "
                f"{_ROWS_PER_ITEM:.0f}: use objective.name=auto or weighted_likelihood, or add "
                "item features to the catalogue"
            )


_OF_EACH_ITEM = frozenset(
    ("ips", "clipped_ips", "snips", "top_k_ips", "dr", "clipped_dr", "potec", "regression")
)
"""Objectives that are near the best fixed item on such logs (docs/results/)."""
