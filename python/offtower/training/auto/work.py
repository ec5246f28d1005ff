"""Operations and memory of candidates: counts that do not depend on the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from offtower.config import Config
from offtower.models.features import embedding_tables
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData
from offtower.training.auto.candidates import PolicyCandidate, make_schedule
from offtower.training.auto.held_out import INVERSE_TEMPERATURES

_STEP_OVERHEAD = 2e7
"""Operations in the time that a step takes beside its arithmetic, 2 ms."""
_SCORE_OPERATIONS = 20
"""Of an exponential and the sums over it, in multiples of a multiplication."""
_OPTIMIZER_OPERATIONS = 12
"""Of AdamW per parameter."""
_NEWTON_STEPS, _SOLUTION_PASSES = 6, 100
"""Newton steps of a solved candidate, and passes over the rows in all of them, at most."""
_STATE_COPIES = 3
"""Weights and two moments of AdamW."""


@dataclass(frozen=True)
class TowerSizes:
    """Numbers of parameters of a candidate's member."""

    context_layers: int
    item_layers: int
    tables: int
    """Rows of embedding tables times their width."""
    dim: int

    @property
    def parameters(self) -> int:
        return self.context_layers + self.item_layers + self.tables

    @classmethod
    def of(cls, candidate: PolicyCandidate, data: PreparedData) -> TowerSizes:
        # Without memory: tables of an id per item are large.
        with torch.device("meta"):
            policy = TwoTowerPolicy(candidate.policy, data.context_encoding, data.item_encoding)

        def count(module: nn.Module) -> int:
            return sum(p.numel() for p in module.parameters())

        def tables(module: nn.Module) -> int:
            return sum(table.weight.numel() for table in embedding_tables(module))

        sides = (policy.context_tower, policy.item_tower)
        context, item = (count(side) - tables(side) for side in sides)
        return cls(context, item, sum(map(tables, sides)), candidate.policy.embedding_dim)


def step_operations(
    candidate: PolicyCandidate, sizes: TowerSizes, num_items: int, batch: int, *, sampled: int
) -> float:
    """Operations of one training step of one member.

    Args:
        sampled: draws of a step; 0 for exact terms.
    """
    needs = candidate.objective.requirements
    scored = 0
    if needs.policy_terms:
        scored = min(num_items, sampled + batch) if sampled else num_items
    embedded = num_items if needs.square_sum else max(batch, scored)
    total = 6.0 * (embedded * (sizes.item_layers + sizes.dim) + batch * sizes.context_layers)
    total += 8.0 * batch * scored * (sizes.dim + _SCORE_OPERATIONS)
    if needs.square_sum:
        total += 6.0 * num_items * sizes.dim**2
    touched = sizes.tables if not sampled else min(sizes.tables, (embedded + batch) * sizes.dim)
    return total + _OPTIMIZER_OPERATIONS * touched + _STEP_OVERHEAD


def solution_operations(sizes: TowerSizes, rows: int) -> float:
    """Operations of the fit of one member that is solved, for rows of distinct items."""
    dim = sizes.dim
    return rows * (_SOLUTION_PASSES * _SCORE_OPERATIONS * dim + _NEWTON_STEPS * 2.0 * dim**3)


def evaluation_operations(sizes: Sequence[TowerSizes], num_items: int) -> float:
    """Operations of the terms of all candidates in one held-out row."""
    temperatures = len(INVERSE_TEMPERATURES)
    return sum(
        num_items * (2.0 * one.dim + temperatures * _SCORE_OPERATIONS)
        for one in (*sizes, *sizes[:1])
    )


def whole_work(config: Config, data: PreparedData, candidates: Sequence[PolicyCandidate]) -> float:
    """Operations of a run without a budget: every candidate on all rows, evaluated on
    `auto.held_out_rows`, and the most expensive one fitted again."""
    settings, rows, items = config.auto, data.train.num_rows, data.items.num_items
    members = settings.members or settings.folds
    schedule = make_schedule(settings, rows)
    steps = schedule.epochs * (rows / schedule.batch_size) * (1.0 - 1.0 / settings.folds)
    sizes = [TowerSizes.of(one, data) for one in candidates]
    draws = config.sampling.num_samples if config.training.terms == "sampled" else 0
    each = [
        solution_operations(size, rows) / steps
        if one.solved
        else step_operations(one, size, items, schedule.batch_size, sampled=draws)
        for one, size in zip(candidates, sizes, strict=True)
    ]
    training = members * steps * (sum(each) + max(each) * settings.refit)
    held_out = min(settings.held_out_rows, rows * members / settings.folds)
    return training + held_out * evaluation_operations(sizes, items)


def member_bytes(sizes: TowerSizes) -> int:
    """Memory of a fitted member."""
    return 4 * sizes.parameters


def training_bytes(sizes: TowerSizes, *, members: int) -> int:
    """Memory of members that train side by side."""
    return members * _STATE_COPIES * member_bytes(sizes)
