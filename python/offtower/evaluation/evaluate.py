"""Evaluate policies on the same rows: values, differences, diagnostics and verdicts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from offtower.data.rounds import cut_before, key_starts
from offtower.errors import OfftowerError
from offtower.evaluation.decision.diagnostics import (
    CalibrationSums,
    PositionSums,
    SupportDiagnostics,
    WeightSums,
    support_probe,
)
from offtower.evaluation.decision.gate import Evidence, decide
from offtower.evaluation.decision.sensitivity import SensitivitySums
from offtower.evaluation.estimators import Difference, Estimator, MeanReward, make_estimator
from offtower.evaluation.estimators.paired import check_aligned
from offtower.evaluation.intervals.methods import (
    Interval,
    bernstein_interval,
    bootstrap_interval,
    normal_interval,
    simultaneous_confidence,
)
from offtower.evaluation.intervals.smoothing_bound import SmoothingSums, check_range
from offtower.evaluation.intervals.statistics import Statistics, collect, finish
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.result import (
    Comparison,
    EstimatorResult,
    EvaluationResult,
    Gap,
    PolicyEvaluation,
)
from offtower.evaluation.rows import Array, EvaluationRows
from offtower.mapping import merge_all

CHUNK_ROWS = 1 << 16
LOGGING = MeanReward()


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

    @classmethod
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
        )

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
        )

    def finish(
        self,
        support: Mapping[str, SupportDiagnostics] | None = None,
        *,
        may_leave_out: Collection[str] = (),
    ) -> EvaluationResult:
        """Values, differences, diagnostics and verdicts.

        Args:
            support: by policy, a probe of `diagnostics.support_probe`.
            may_leave_out: policies that are named in `unsupported`, instead of an error, where
                every weight is 0.
        """
        unknown = set(support or {}) - set(self.policies)
        if unknown:
            raise OfftowerError(f"a support probe for unknown policies: {sorted(unknown)}")
        return _Finisher(self).result(support or {}, may_leave_out)

    def estimates(self, min_effective_rows: float) -> dict[str, EstimatorResult | None]:
        """By policy its value by the first estimator; None for a policy of fewer effective rows."""
        finisher = _Finisher(self)
        return {
            name: finisher.estimate(i, 0)
            if self.weights[i].finish().effective_sample_size >= min_effective_rows
            else None
            for i, name in enumerate(self.policies)
        }


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
    )


class _Finisher:
    """Computes a result from sums."""

    def __init__(self, sums: EvaluationSums) -> None:
        self.sums, self.options = sums, sums.options
        widths = [estimator.num_terms for estimator in self.options.estimators]
        self.starts = np.concatenate([[0], np.cumsum(widths)]).tolist()
        self.reward_column = [len(sums.policies) * self.starts[-1]]
        self.joint = simultaneous_confidence(self.options.confidence, len(sums.policies))
        users = sums.terms.users
        self.terms = sums.terms if users is None else replace(sums.terms, users=users.compact())
        self.users = None if users is None else users.count
        slates = sums.positions[0] is not None
        weighted = sums.terms.row_weights is not None
        self.independent = not slates and not weighted and self.users in (None, sums.terms.n)

    def columns(self, policy: int, estimator: int) -> list[int]:
        base = policy * self.starts[-1]
        return list(range(base + self.starts[estimator], base + self.starts[estimator + 1]))

    def unsupported(self) -> list[int]:
        """Policies whose every weight is 0, where an estimator reads weights."""
        if not any(estimator.uses_weight for estimator in self.options.estimators):
            return []
        return [i for i, one in enumerate(self.sums.weights) if not one.top.any()]

    def result(
        self, support: Mapping[str, SupportDiagnostics], may_leave_out: Collection[str]
    ) -> EvaluationResult:
        options, policies = self.options, self.sums.policies
        left_out = [i for i in self.unsupported() if policies[i] in may_leave_out]
        kept = [i for i in range(len(policies)) if i not in left_out]
        logged = self.terms.select(self.reward_column)
        intervals = self.intervals(LOGGING, logged)
        return EvaluationResult(
            confidence=options.confidence,
            simultaneous_confidence=self.joint,
            reward_range=options.reward_range,
            n=self.sums.terms.n,
            users=self.users,
            logging=EstimatorResult(
                LOGGING.name, LOGGING.label, finish(LOGGING, logged), intervals
            ),
            decide_by=options.estimators[options.decider].name,
            policies={
                policies[i]: self.policy(i, policies[i], support.get(policies[i])) for i in kept
            },
            comparisons=tuple(self.comparison(a, b) for a, b in combinations(kept, 2)),
            unsupported=tuple(policies[i] for i in left_out),
            propensities_estimated=options.propensities_estimated,
            logging_rewards={
                name: self.named_logging(i) for i, name in enumerate(options.reward_names)
            },
        )

    def named_logging(self, reward: int) -> EstimatorResult:
        """The logging policy's mean of a named reward."""
        assert self.sums.named is not None
        column = [self.named_columns(reward, 0).stop - 1]
        statistics = self.sums.named.select(column)
        estimate = finish(LOGGING, statistics)
        intervals = self.named_intervals(LOGGING, statistics)
        return EstimatorResult(LOGGING.name, LOGGING.label, estimate, intervals)

    def named_value(self, policy: int, reward: int) -> EstimatorResult:
        """A policy's value in a named reward."""
        assert self.sums.named is not None
        estimator = self.options.named_estimator
        every = self.named_columns(reward, policy)
        own = list(range(every.start, every.start + estimator.num_terms))
        statistics = self.sums.named.select(own, self.sums.weights[policy].statistics.weight_sum)
        return EstimatorResult(
            estimator.name,
            estimator.label,
            estimator.finish(statistics),
            self.named_intervals(estimator, statistics),
            self.gap(
                Difference(estimator, LOGGING), self.sums.named.select([*own, every.stop - 1])
            ),
            estimator.consistent,
        )

    def named_columns(self, reward: int, policy: int) -> range:
        """Columns of a named reward from a policy's terms to the reward itself."""
        width, policies = self.options.named_estimator.num_terms, len(self.sums.policies)
        start = reward * (policies * width + 1)
        return range(start + policy * width, start + policies * width + 1)

    def named_intervals(self, estimator: Estimator, statistics: Statistics) -> dict[str, Interval]:
        """Intervals that need no range: that of a named reward is not known."""
        make = {"normal": normal_interval, "bootstrap": bootstrap_interval}
        return {
            method: make[method](estimator, statistics, self.options.confidence)
            for method in self.options.intervals
            if method in make
        }

    def policy(self, index: int, name: str, support: SupportDiagnostics | None) -> PolicyEvaluation:
        options, sums = self.options, self.sums
        results = [self.estimate(index, i) for i in range(len(options.estimators))]
        weights = sums.weights[index].finish()
        calibration, smoothing = sums.calibration[index], sums.smoothing[index]
        positions = sums.positions[index]
        by_position = () if positions is None else positions.finish()
        chosen = options.estimators[options.decider]
        gap = results[options.decider].difference
        assert gap is not None
        evidence = Evidence(
            gap.estimate,
            gap.simultaneous,
            weights,
            smoothing.difference(self.joint) if self.independent else None,
            support,
            chosen.name,
            chosen.consistent,
            options.propensities_estimated,
            smoothing.mean_weight() if self.independent else None,
            self.users,
            by_position,
            self.sensitivity(index, gap),
        )
        value, difference = smoothing.value, smoothing.difference
        return PolicyEvaluation(
            policy=name,
            estimates={result.name: result for result in results},
            guaranteed_value=value(options.confidence) if self.independent else None,
            guaranteed_difference=difference(options.confidence) if self.independent else None,
            weights=weights,
            calibration=None if calibration is None else calibration.finish(),
            support=support,
            verdict=decide(evidence, options.gate),
            positions=by_position,
            sensitivity=evidence.sensitivity,
            rewards={
                reward: self.named_value(index, i) for i, reward in enumerate(options.reward_names)
            },
        )

    def sensitivity(self, policy: int, gap: Gap) -> float | None:
        """By which factor estimated propensities may be wrong before the policy's side changes."""
        if not self.sums.sensitivity:
            return None
        logging = finish(LOGGING, self.terms.select(self.reward_column)).value
        half_width = 0.5 * (gap.simultaneous.high - gap.simultaneous.low)
        margin = self.options.gate.margin
        return self.sums.sensitivity[policy].largest_factor(logging, half_width, margin)

    def estimate(self, policy: int, index: int) -> EstimatorResult:
        estimator, columns = self.options.estimators[index], self.columns(policy, index)
        own = self.terms.select(columns, self.sums.weights[policy].statistics.weight_sum)
        paired = self.terms.select(columns + self.reward_column)
        return EstimatorResult(
            estimator.name,
            estimator.label,
            estimator.finish(own),
            self.intervals(estimator, own),
            self.gap(Difference(estimator, LOGGING), paired),
            estimator.consistent,
        )

    def comparison(self, first: int, second: int) -> Comparison:
        decider = self.options.decider
        estimator = self.options.estimators[decider]
        columns = self.columns(first, decider) + self.columns(second, decider)
        gap = self.gap(Difference(estimator, estimator), self.terms.select(columns))
        names = self.sums.policies
        return Comparison(names[first], names[second], estimator.name, gap)

    def gap(self, difference: Difference, statistics: Statistics) -> Gap:
        main = self.options.intervals[0]
        make = bootstrap_interval if main == "bootstrap" else normal_interval
        return Gap(
            finish(difference, statistics),
            make(difference, statistics, self.options.confidence),
            make(difference, statistics, self.joint),
        )

    def intervals(self, estimator: Estimator, statistics: Statistics) -> dict[str, Interval]:
        out, confidence = {}, self.options.confidence
        for method in self.options.intervals:
            if method == "normal":
                out[method] = normal_interval(estimator, statistics, confidence)
            elif method == "bootstrap":
                out[method] = bootstrap_interval(estimator, statistics, confidence)
            elif self.independent and estimator.num_terms == 1:
                bounds = estimator.bounds(self.options.reward_range, self.options.max_weight)
                unclustered = replace(statistics, users=None)
                out[method] = bernstein_interval(estimator, unclustered, bounds, confidence)
        return out


def evaluate_rows(
    rows_by_policy: Mapping[str, EvaluationRows],
    estimators: Iterable[Estimator | str] | None = None,
    *,
    reward_range: tuple[float, float],
    confidence: float = 0.95,
    intervals: Sequence[str] = ("normal", "bootstrap"),
    support: Mapping[str, Any] | None = None,
    **options: Any,
) -> EvaluationResult:
    """Evaluate policies on the same logged rows.

    Args:
        rows_by_policy: per policy the rows as it sees them, in the same order.
        estimators: objects, or names that need no parameter; by default IPS and SNIPS, and DM and
            DR where every policy's rows have a reward model's terms (of slates DR alone, where they
            have the weights of earlier positions).
        support: by policy, the logging probabilities of items drawn from that policy
            (`diagnostics.support_probe`).
        options: the other fields of `EvaluationOptions`.

    Raises:
        OfftowerError: rows differ between policies, there are fewer than two rows, a column is
            missing, the log lacks support, or an option is wrong.
    """
    chosen = _estimators(rows_by_policy, estimators)
    try:
        settings = EvaluationOptions(
            chosen, check_range(reward_range), confidence, tuple(intervals), **options
        )
    except TypeError as error:
        raise OfftowerError(f"evaluate_rows: {error}") from None
    probes = {
        name: probe if isinstance(probe, SupportDiagnostics) else support_probe(probe)
        for name, probe in (support or {}).items()
    }
    shards = (EvaluationSums.of(shard, settings) for shard in _shards(rows_by_policy))
    return merge_all(shards).finish(probes)


def _estimators(
    rows_by_policy: Mapping[str, EvaluationRows], given: Iterable[Estimator | str] | None
) -> tuple[Estimator, ...]:
    if given is None:
        modeled = all(
            rows.action_reward is not None and rows.expected_reward is not None
            for rows in rows_by_policy.values()
        )
        slates = any(rows.round is not None for rows in rows_by_policy.values())
        if slates:
            modeled = modeled and all(
                rows.earlier_weight is not None for rows in rows_by_policy.values()
            )
        direct = () if slates else ("dm",)
        given = ("ips", "snips", *direct, "dr") if modeled else ("ips", "snips")
    return tuple(make_estimator(e) if isinstance(e, str) else e for e in given)


def _shards(rows_by_policy: Mapping[str, EvaluationRows]) -> Iterator[dict[str, EvaluationRows]]:
    """Chunks of bounded size, with row keys."""
    sizes = {name: rows.n for name, rows in rows_by_policy.items()}
    if len(set(sizes.values())) > 1:
        raise OfftowerError(f"every policy needs the same rows; their numbers differ: {sizes}")
    n = next(iter(sizes.values()), 0)
    if rows_by_policy and n < 2:
        raise OfftowerError(f"an evaluation needs at least two rows; there are {n}")
    first = next(iter(rows_by_policy.values()), None)
    if first is None or first.round is None:
        edges = [*range(0, max(n, 1), CHUNK_ROWS), n]
    else:
        edges = cut_before(key_starts(first.round), CHUNK_ROWS)
    for start, stop in pairwise(edges):
        part = slice(start, stop)
        key = np.arange(part.start, part.stop, dtype=np.int64)
        yield {
            name: shard if shard.row is not None else replace(shard, row=key)
            for name, rows in rows_by_policy.items()
            for shard in (rows.take(part),)
        }
