"""Sums over the log of an evaluation, for all policies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.decision.calibration import CalibrationSums
from offtower.evaluation.decision.sensitivity import SensitivitySums
from offtower.evaluation.decision.support import SupportDiagnostics
from offtower.evaluation.decision.weights import PositionSums, WeightSums
from offtower.evaluation.estimates import LOGGING, Estimates
from offtower.evaluation.estimators.paired import check_aligned
from offtower.evaluation.intervals.smoothing_bound import SmoothingSums
from offtower.evaluation.intervals.statistics import Statistics, collect
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.result import (
    EstimatorResult,
    EvaluationResult,
)
from offtower.evaluation.rows import Array, EvaluationRows

overflowing = np.errstate(over="ignore", invalid="ignore")
"""Squares of weights of 1e155 and more overflow: their errors are infinite, without warnings."""


@dataclass(frozen=True, eq=False)
class EvaluationSums:
    """Sums over a shard of the log, for all policies; they merge in any order.

    The terms of every estimator under every policy, and the reward, are columns of one
    `Statistics`, so that any difference of two values is paired.
    """

    policies: tuple[str, ...]
    options: EvaluationOptions
    terms: Statistics
    weights: tuple[WeightSums, ...]
    calibration: tuple[CalibrationSums | None, ...]
    smoothing: tuple[SmoothingSums, ...]
    positions: tuple[PositionSums | None, ...]
    """By policy, weights by position; None for rows that are no slates."""
    sensitivity: tuple[SensitivitySums, ...] = ()
    """By policy; empty unless the propensities are estimates, and for slates."""
    named: Statistics | None = None
    """Terms of each named reward: under each policy, then the reward itself; None without them."""
    rewarded: int = 0
    """Rows (rounds of slates) whose reward is not 0."""
    timed_weights: Statistics | None = None
    """By policy w and w / (1 + w), with sums by time; None for rows without times."""

    @classmethod
    @overflowing
    def of(
        cls, rows_by_policy: Mapping[str, EvaluationRows], options: EvaluationOptions
    ) -> EvaluationSums:
        """Sums over a shard: the same logged rows, as seen by each policy."""
        if not rows_by_policy:
            raise OfftowerError("there is no policy to evaluate")
        first = next(iter(rows_by_policy.values()))
        by_user = options.by_user if options.by_user is not None else first.user is not None
        columns: list[Array] = []
        for policy, rows in rows_by_policy.items():
            check_aligned(first, rows)
            try:
                columns += [estimator.terms(rows) for estimator in options.estimators]
            except OfftowerError as error:
                raise type(error)(f"policy '{policy}': {error}") from None
        columns.append(LOGGING.terms(first))
        every = tuple(rows_by_policy.values())
        return cls(
            tuple(rows_by_policy),
            options,
            collect(
                np.concatenate(columns, axis=1),
                first,
                by_user=by_user,
                replicates=options.bootstrap_replicates(len(every)),
                seed=options.seed,
                grouped=True,
                timed=True,
            ),
            tuple(WeightSums.of(rows, by_user) for rows in every),
            tuple(CalibrationSums.of(rows) for rows in every),
            tuple(SmoothingSums.of(rows.by_row(), options.reward_range) for rows in every),
            tuple(PositionSums.of(rows) for rows in every),
            tuple(
                SensitivitySums.of(rows, options.reward_range)
                for rows in every
                if options.propensities_estimated and rows.round is None
            ),
            _named_statistics(every, options, by_user),
            int(np.count_nonzero(first.summed(first.reward))),
            _timed_weights(every, by_user),
        )

    @overflowing
    def merge(self, other: EvaluationSums) -> EvaluationSums:
        """Sums over both shards."""
        if self.policies != other.policies or self.options != other.options:
            raise OfftowerError("only shards of the same evaluation can be merged")
        return EvaluationSums(
            self.policies,
            self.options,
            self.terms.merge(other.terms),
            tuple(a.merge(b) for a, b in zip(self.weights, other.weights, strict=True)),
            tuple(
                a.merge(b) if a is not None and b is not None else None
                for a, b in zip(self.calibration, other.calibration, strict=True)
            ),
            tuple(a.merge(b) for a, b in zip(self.smoothing, other.smoothing, strict=True)),
            tuple(
                a.merge(b) if a is not None and b is not None else None
                for a, b in zip(self.positions, other.positions, strict=True)
            ),
            tuple(a.merge(b) for a, b in zip(self.sensitivity, other.sensitivity, strict=True)),
            None if self.named is None or other.named is None else self.named.merge(other.named),
            self.rewarded + other.rewarded,
            None
            if self.timed_weights is None or other.timed_weights is None
            else self.timed_weights.merge(other.timed_weights),
        )

    @overflowing
    def finish(
        self,
        support: Mapping[str, SupportDiagnostics] | None = None,
        *,
        may_leave_out: Collection[str] = (),
    ) -> EvaluationResult:
        """Values, differences, diagnostics and verdicts.

        Args:
            support: by policy, a probe of `support_probe`.
            may_leave_out: policies that are named in `unsupported`, instead of an error, where
                every weight is 0.
        """
        unknown = set(support or {}) - set(self.policies)
        if unknown:
            raise OfftowerError(f"a support probe for unknown policies: {sorted(unknown)}")
        return Estimates(self).result(support or {}, may_leave_out)

    def estimates(self, min_effective_rows: float) -> dict[str, EstimatorResult | None]:
        """By policy its value by the first estimator; None for a policy of fewer effective rows."""
        finisher = Estimates(self)
        return {
            name: finisher.estimate(i, 0)
            if self.weights[i].finish().effective_sample_size >= min_effective_rows
            else None
            for i, name in enumerate(self.policies)
        }


def _timed_weights(every: tuple[EvaluationRows, ...], by_user: bool) -> Statistics | None:
    """Statistics of the weights and of a bounded function of them, by time."""
    if every[0].time is None:
        return None
    columns = []
    for rows in every:
        columns += [rows.mean_weight, rows.share_of_unit * _bounded(rows.importance_weight)]
    return collect(np.stack(columns, axis=1), every[0], by_user=by_user, timed=True)


def _bounded(weight: Array) -> Array:
    """w / (1 + w), which moves with the policies' distance and has no tail."""
    return np.asarray(1.0 - 1.0 / (1.0 + weight))


def _named_statistics(
    every: tuple[EvaluationRows, ...], options: EvaluationOptions, by_user: bool
) -> Statistics | None:
    """Statistics of the named rewards, one after the other."""
    names, first = options.reward_names, every[0]
    if not names:
        return None
    if first.rewards is None or first.rewards.shape[1] != len(names):
        raise OfftowerError(f"rows need {len(names)} named rewards ({', '.join(names)})")
    columns = []
    for index in range(len(names)):
        columns += [options.named_estimator.terms(rows.with_reward(index)) for rows in every]
        columns.append(LOGGING.terms(first.with_reward(index)))
    return collect(
        np.concatenate(columns, axis=1),
        first,
        by_user=by_user,
        replicates=options.bootstrap_replicates(len(every)),
        seed=options.seed,
        grouped=True,
        timed=True,
    )
