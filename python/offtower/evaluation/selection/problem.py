"""The rows of an off-policy problem, and the candidate estimators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from offtower.data.rounds import Rounds
from offtower.errors import OfftowerError
from offtower.evaluation.rows import Array, EvaluationRows, IntArray, ModelPredictions


@dataclass(frozen=True)
class Candidate:
    """An estimator, and the reward model whose predictions it reads (None: it reads none).

    name: unique among the candidates. consistent: whether its bias vanishes with n given true
    propensities and full support; None asks the estimator (true for IPS, SNIPS, DR and SNDR).
    assumes: consistent under an assumption that may hold exactly, such as that rewards in a slate
    do not depend on later items; the prior on its bias then has a spike at 0.
    """

    name: str
    estimator: Any
    model: str | None = None
    consistent: bool | None = None
    assumes: bool = False

    @property
    def is_consistent(self) -> bool:
        if self.consistent is not None:
            return self.consistent
        return bool(getattr(self.estimator, "consistent", False))

    @property
    def family(self) -> str:
        """The estimator's class name, by which ties are broken."""
        return type(self.estimator).__name__


@dataclass(frozen=True)
class SlateColumns:
    """Columns of `EvaluationRows` for the slates of a problem's n rows."""

    round: IntArray
    earlier_weight: Array | None
    slate_weight: Array

    @cached_property
    def rounds(self) -> Rounds:
        return Rounds.of(self.round)


@dataclass(frozen=True)
class Problem:
    """One off-policy problem by rows: weight (n,), reward (n,), terms of each reward model.

    slates: where the rows form rounds; `n` and every index then count rounds.
    """

    weight: Array
    reward: Array
    models: Mapping[str, ModelPredictions] = field(default_factory=dict)
    slates: SlateColumns | None = None

    @property
    def n(self) -> int:
        """Number of rows, or of rounds of slates."""
        return int(self.reward.shape[0]) if self.slates is None else len(self.slates.rounds)

    def rows(self, model: str | None, index: IntArray | None = None) -> EvaluationRows:
        """Rows for an estimator; `index` (m,) picks some, with repetition where it repeats."""
        if self.slates is not None:
            return self._slate_rows(model, index, self.slates)
        weight, reward = self.weight, self.reward
        action = expected = None
        if model is not None:
            terms = self.models[model]
            action, expected = terms.action_reward, terms.expected_reward
        if index is not None:
            weight, reward = weight[index], reward[index]
            action = None if action is None else action[index]
            expected = None if expected is None else expected[index]
        return EvaluationRows(
            importance_weight=weight,
            reward=reward,
            action_reward=action,
            expected_reward=expected,
        )

    def _slate_rows(
        self, model: str | None, index: IntArray | None, slates: SlateColumns
    ) -> EvaluationRows:
        rounds = slates.rounds
        taken = np.arange(len(rounds)) if index is None else index
        row = rounds.rows_of(taken)
        terms = None if model is None else self.models[model]
        earlier = slates.earlier_weight
        return EvaluationRows(
            importance_weight=self.weight[row],
            reward=self.reward[row],
            action_reward=None if terms is None else terms.action_reward[row],
            expected_reward=None if terms is None else terms.expected_reward[row],
            # A repeated round counts as often as it is repeated.
            round=np.repeat(np.arange(taken.size), rounds.lengths[taken]),
            earlier_weight=None if earlier is None else earlier[row],
            slate_weight=slates.slate_weight[row],
        )

    def values(self, candidates: Sequence[Candidate], index: IntArray | None = None) -> Array:
        """Each candidate's estimate on the rows (or on `index` of them): (len(candidates),)."""
        shared: dict[str | None, EvaluationRows] = {}
        out = np.empty(len(candidates))
        for j, candidate in enumerate(candidates):
            if candidate.model not in shared:
                shared[candidate.model] = self.rows(candidate.model, index)
            out[j] = candidate.estimator.estimate(shared[candidate.model]).value
        return out

    def influence(self, candidates: Sequence[Candidate]) -> tuple[Array, Array]:
        """Values (c,) and centered per-row contributions (c, n): value ~ truth + mean(influence).

        mean(influence^2) / n is a candidate's variance, and the same of a difference of two rows is
        the variance of their paired difference.
        """
        values = np.empty(len(candidates))
        influence = np.empty((len(candidates), self.n))
        for j, candidate in enumerate(candidates):
            rows = self.rows(candidate.model)
            values[j] = candidate.estimator.estimate(rows).value
            contributions = np.asarray(candidate.estimator.contributions(rows), dtype=np.float64)
            influence[j] = contributions - contributions.mean()
        return values, influence


def check_candidates(candidates: Iterable[Candidate], models: Iterable[str]) -> list[Candidate]:
    """The candidates as a list; OfftowerError for none, repeated names or unknown reward models."""
    out = list(candidates)
    if not out:
        raise OfftowerError("estimator selection needs at least one candidate.")
    names = [c.name for c in out]
    repeated = sorted({x for x in names if names.count(x) > 1})
    if repeated:
        raise OfftowerError(f"candidate names must be unique; repeated: {', '.join(repeated)}.")
    known = set(models)
    for candidate in out:
        if candidate.model is not None and candidate.model not in known:
            raise OfftowerError(
                f"candidate {candidate.name!r} reads the reward model {candidate.model!r}, but the "
                f"log has {sorted(known) or 'none'}."
            )
    return out
