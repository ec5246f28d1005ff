"""Policies of candidates, and their weights and expected rewards on held-out rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.models.policy import TwoTowerPolicy

INVERSE_TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""In units of 1 / (standard deviation of a candidate's logits between items)."""

BASED_INVERSE_TEMPERATURES = (2.0**-10, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Likewise, of policies that tilt a base measure, which is the first of them: softer ones differ
little from the logging policy, so that fewer rows show whether the scores rank items correctly."""

CLONE_SCALE = 4.0
"""In place of that deviation for the clone of the logging policy, whose scores are log
probabilities: it is evaluated as it is, at 1, and up to eight times as sharp."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CandidatePolicy:
    """A candidate's policy at one inverse temperature."""

    name: str
    inverse_temperature: float


@dataclass(frozen=True)
class HeldOutTerms:
    """Terms of one policy on the held-out rows."""

    weight: Array
    """(n,) pi(a|x) / pscore."""
    expected_reward: Array
    """(n,) sum_a pi(a|x) q(x, a); zero without a reward model."""

    @classmethod
    def concat(cls, parts: Sequence[HeldOutTerms]) -> HeldOutTerms:
        """The terms of all parts' rows."""
        return cls(
            np.concatenate([one.weight for one in parts]),
            np.concatenate([one.expected_reward for one in parts]),
        )


@dataclass(frozen=True)
class EvaluatedCandidates:
    """Candidates of which at most one predicts rewards."""

    members: Mapping[str, Sequence[TwoTowerPolicy]]
    scale: Mapping[str, float]
    """Standard deviation of each candidate's logits between items; `CLONE_SCALE` for the clone."""
    loss: Mapping[str, float]
    """Held-out losses of the regressions that were compared."""
    binary: bool
    """Whether the reward model's logits are those of probabilities."""
    based: frozenset[str] = frozenset()
    """Candidates whose item biases are logarithms of a base measure (`mixed_policy`): their scores
    are without it, and it does not depend on the temperature."""

    def without(self, names: Collection[str]) -> EvaluatedCandidates:
        return replace(
            self,
            members={name: one for name, one in self.members.items() if name not in names},
            scale={name: one for name, one in self.scale.items() if name not in names},
        )

    def inverse_temperatures(self, name: str) -> list[float]:
        """Of a candidate's policies, ascending."""
        units = BASED_INVERSE_TEMPERATURES if name in self.based else INVERSE_TEMPERATURES
        return [s / self.scale[name] for s in units]

    @property
    def policies(self) -> list[CandidatePolicy]:
        """Of all candidates, each one's in ascending inverse temperature."""
        return [CandidatePolicy(n, s) for n in self.members for s in self.inverse_temperatures(n)]

    @property
    def reward_model(self) -> str | None:
        """The regression among the candidates."""
        return next((name for name in self.loss if name in self.members), None)


@dataclass(frozen=True)
class HeldOutRows:
    """Held-out rows in one order for all policies.

    q is the held-out prediction of the best regression candidate.
    """

    reward: Array
    """(n,)."""
    terms: Mapping[CandidatePolicy, HeldOutTerms]
    """Each candidate's policies in ascending inverse temperature."""
    action_reward: Array
    """(n,) q(x_i, a_i); zero without a regression candidate."""
    scale: Mapping[str, float]
    """Standard deviation of each candidate's logits between items."""
    loss: Mapping[str, float]
    """Held-out loss of each regression candidate."""
    unit: NDArray[np.int64] | None
    """(n,) number, from 0 and without gaps, of the user or context by which rows are correlated;
    None where all rows are independent."""
    pscore: Array
    """(n,) logged propensity."""
    eligible_items: Array
    """(n,) number of items that could have been shown."""
    unit_key: NDArray[np.uint64] | None = None
    """(n,) keys that `unit` numbers; None where folds are by row."""
    count: Array | None = None
    """(n,) rows of the log that each one stands for, one over the probability with which it was
    sampled (Horvitz and Thompson 1952, "A generalization of sampling without replacement from a
    finite universe"); None is 1 for all."""
    based: frozenset[str] = frozenset()
    """Candidates whose policies are proportional to base x exp(inverse temperature x score)."""
    sampling_size: Array | None = None
    """(n,) sizes to which these probabilities are proportional (`row_sampling`); None with equal
    ones."""

    @property
    def size(self) -> float:
        """Number of rows that these stand for."""
        return float(len(self.reward) if self.count is None else self.count.sum())

    def effective_size(self, weight: Array) -> float:
        """Number of equally counted rows in which a mean of such weights (n,) has the same
        variance: of equal weights (sum c)^2 / sum c^2 (Kish 1965)."""
        if self.count is None:
            return self.size
        square = self.count * np.square(weight)
        total = float(square.sum())
        if not total > 0.0:
            square, total = self.count, self.size
        return self.size * total / float(self.count @ square)

    def mean(self, values: Array) -> Any:
        """Mean over the rows that these stand for, of (n,) or (n, k) values: a number or (k,)."""
        if self.count is None:
            return values.mean(axis=0)
        return self.count @ values / self.size

    @cached_property
    def inverse_pscore(self) -> float:
        """Mean of 1 / pscore (N where all items may be shown): about the weight of a row that shows
        the item of a sharp policy."""
        return float(self.mean(np.reciprocal(self.pscore)))

    def policies(self, name: str) -> list[CandidatePolicy]:
        """One candidate's policies in ascending inverse temperature."""
        return [policy for policy in self.terms if policy.name == name]

    def without(self, names: Collection[str]) -> HeldOutRows:
        """The same rows for the other candidates."""
        return replace(
            self,
            terms={policy: one for policy, one in self.terms.items() if policy.name not in names},
            scale={name: one for name, one in self.scale.items() if name not in names},
        )

    def merge(self, other: HeldOutRows) -> HeldOutRows:
        """Add other rows of the same candidates."""
        key = None
        if self.unit_key is not None and other.unit_key is not None:
            key = np.concatenate([self.unit_key, other.unit_key])
        return replace(
            self,
            reward=np.concatenate([self.reward, other.reward]),
            terms={
                policy: HeldOutTerms.concat([one, other.terms[policy]])
                for policy, one in self.terms.items()
            },
            action_reward=np.concatenate([self.action_reward, other.action_reward]),
            unit=None if key is None else numbered_units(key),
            unit_key=key,
            pscore=np.concatenate([self.pscore, other.pscore]),
            eligible_items=np.concatenate([self.eligible_items, other.eligible_items]),
            count=_joined(self.count, other.count),
            sampling_size=_joined(self.sampling_size, other.sampling_size),
        )


def numbered_units(keys: NDArray[np.uint64]) -> NDArray[np.int64] | None:
    """Numbers of keys, from 0 and without gaps; None where all are distinct."""
    distinct, number = np.unique(keys, return_inverse=True)
    return None if len(distinct) == len(keys) else number.astype(np.int64)


def _joined(one: Array | None, other: Array | None) -> Array | None:
    return None if one is None or other is None else np.concatenate([one, other])
