"""Notes before training: objectives and schedules that cannot learn from a log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from offtower.config import Config, TowerConfig
from offtower.models.towers import tower_of_features
from offtower.objectives import Objective
from offtower.prepare import PreparedData
from offtower.training.auto.prior_order import ids_only
from offtower.training.auto.rewarded_rows import RewardedRows

_ROWS_PER_ITEM = 10.0
"""Rewarded rows below which an id is too rarely rewarded for its own regression."""
_OF_EACH_ITEM = frozenset(("snips", "dr", "clipped_dr", "regression"))
"""Objectives below the others on such logs; `dr` is not measured and is the same without clipping
(docs/results/2026-11-30-label-logs.md)."""
_STEPS = 100
_BATCHES = 16
"""Batches of an epoch that the proposed batch size makes of a small log."""
_PROPOSED_STEPS = 400
_SHARP = 0.2
"""Largest temperature at which scores between 0 and 1 rank more than a few items."""


class _Schedule(Protocol):
    epochs: int
    batch_size: int


def _more_steps(section: str, schedule: _Schedule, rows: int) -> str | None:
    """A schedule of enough steps where the configured one has too few; else None."""
    steps = schedule.epochs * -(-rows // schedule.batch_size)
    if steps >= _STEPS:
        return None
    batch = min(schedule.batch_size, max(32, rows // _BATCHES))
    epochs = -(-_PROPOSED_STEPS // -(-rows // batch))
    return (
        f"{section}.epochs={schedule.epochs} of {rows:,} rows are only {steps} steps of "
        f"{schedule.batch_size} rows: set {section}.batch_size={batch} and "
        f"{section}.epochs={epochs}"
    )


def suitability_notes(config: Config, objective: Objective, data: PreparedData) -> Iterator[str]:
    """Yield one sentence, with a remedy, for each reason why the configured training may fail.

    Reads at most the first million rows of the training log.
    """
    rows = data.train.num_rows
    schema = data.train.schema
    chooses = schema.pscore is not None and not schema.slates  # other logs have no `auto`
    steps = _more_steps("training", config.training, rows)
    if steps is not None:
        yield steps + (", or use objective.name=auto, which chooses both" if chooses else "")
    model = config.reward_model
    if objective.requirements.reward_model and model.kind == "factored":
        steps = _more_steps("reward_model", model, rows)
        if steps is not None:
            yield steps
    for side, encoding in (("context", data.context_encoding), ("item", data.item_encoding)):
        tower: TowerConfig = getattr(config.policy, f"{side}_tower")
        plain = tower_of_features(replace(tower, hidden_layer_sizes=None), encoding)
        if tower.hidden_layer_sizes and plain.hidden_layer_sizes == ():
            yield (
                f"policy.{side}_tower.hidden_layer_sizes={list(tower.hidden_layer_sizes)} stands "
                f"between the embeddings of '{encoding.specs[0].name}', the only feature, and the "
                "output, which learns rare values poorly: leave it null"
            )
    temperature = config.policy.softmax_temperature(objective.name) * config.serving.temperature
    if objective.requirements.square_sum and temperature > _SHARP:
        yield (
            f"objective '{objective.name}' fits scores between 0 and 1, whose softmax at "
            f"temperature {temperature:g} is nearly uniform: set policy.temperature=0.05, or "
            "choose one with 'offtower tune serving'"
        )
    if objective.name in _OF_EACH_ITEM and ids_only(data):
        counts = RewardedRows.of(data).counts
        items, often = len(counts), int((counts >= _ROWS_PER_ITEM).sum())
        if often < items / 2:
            yield (
                f"objective '{objective.name}' learns each item from its own rewarded rows, and "
                f"{items - often:,} of {items:,} items, known by their ids only, have fewer than "
                f"{_ROWS_PER_ITEM:.0f}: "
                + ("use objective.name=auto or weighted_likelihood, or " if chooses else "")
                + "add item features to the catalogue"
            )
