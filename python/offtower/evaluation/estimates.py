"""Values, differences, diagnostics and verdicts from the sums of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from offtower.errors import UndefinedIntervalError
from offtower.evaluation.decision.gate import Evidence, decide
from offtower.evaluation.decision.support import SupportDiagnostics
from offtower.evaluation.drift import OverTime, TimedPolicy, TimedValue, TimeResult, qualify
from offtower.evaluation.estimators import Difference, Estimator, MeanReward
from offtower.evaluation.intervals.gamma import gamma_interval
from offtower.evaluation.intervals.methods import (
    DEFAULT_METHOD,
    Interval,
    bernstein_interval,
    bootstrap_interval,
    normal_interval,
)
from offtower.evaluation.intervals.regression import least_units
from offtower.evaluation.intervals.statistics import Functional, Statistics, finish
from offtower.evaluation.intervals.unseen import Span, reward_span, unseen_terms, weight_span
from offtower.evaluation.result import (
    Comparison,
    EstimatorResult,
    EvaluationResult,
    Gap,
    PolicyEvaluation,
)
from offtower.evaluation.rows import Array, EvaluationRows

if TYPE_CHECKING:
    from offtower.evaluation.sums import EvaluationSums

Terms = tuple[Functional, Statistics, Array]
"""A functional, the statistics of its terms, and terms of rows that the log may lack."""

LOGGING = MeanReward()
LOGGED = Span(1.0, 1.0)
"""Weights under the logging policy."""
ASYMPTOTIC = ("gamma", "normal", "bootstrap")
"""Methods that exist for every functional."""
LOG_PROB_ROUNDING = 3e-5
"""Relative error of a weight by rounding, at most: log-probabilities come from float32 logits, and
weights of served slates were off by up to this at a perplexity of 2 (`tests.roundtrip`)."""


class Estimates:
    """Computes a result from sums."""

    def __init__(self, sums: EvaluationSums) -> None:
        self.sums, self.options = sums, sums.options
        options = sums.options
        widths = [estimator.num_terms for estimator in self.options.estimators]
        self.starts = np.concatenate([[0], np.cumsum(widths)]).tolist()
        self.reward_column = [len(sums.policies) * self.starts[-1]]
        count = len(sums.policies)
        self.joint = [self.options.verdict_confidence(i, count) for i in range(count)]
        users = sums.terms.users
        self.terms = sums.terms if users is None else replace(sums.terms, users=users.compact())
        self.users = None if users is None else users.count
        self.slates = sums.positions[0] is not None
        weighted = sums.terms.row_weights is not None
        self.independent = not self.slates and not weighted and self.users in (None, sums.terms.n)
        self.rewards = reward_span(self.terms.select(self.reward_column), self.options.reward_range)
        least, most = self.options.reward_range
        self.difference_range = (
            (-math.inf, math.inf) if self.slates else (least - most, most - least)
        )
        self.value_range = (-math.inf, math.inf) if self.slates else (least, most)
        bound = self.options.max_weight
        self.weight_spans = [weight_span(one.statistics, bound) for one in sums.weights]
        self.method = options.intervals[0] if options.intervals[0] in ASYMPTOTIC else DEFAULT_METHOD
        self._latest: tuple[tuple[int, int], tuple[Terms, Terms]] | None = None
        self.time: OverTime | None = None
        if self.terms.time is not None:
            supported = set(range(count)) - set(self.unsupported())
            tested = [TimedValue(*self.logged[:2])]
            tested += [TimedValue(*self.own(i, options.decider)[:2]) for i in sorted(supported)]
            self.time = OverTime.of(self.terms.time, options.time, options.confidence, tested)
            self.independent = self.independent and not self.time.correlated

    def timed(self, policy: int, index: int) -> TimedPolicy:
        """A policy's value by an estimator and its difference to the logging policy, by time."""
        return TimedPolicy(
            self._timed(self.own(policy, index), self.value_range),
            self._timed(self.paired(policy, index), self.difference_range),
            self.joint[policy],
        )

    def _timed(self, terms: Terms, possible: tuple[float, float]) -> TimedValue:
        interval = _interval(self.method, *terms[:2], self.options.confidence, terms[2])
        return TimedValue(terms[0], terms[1], interval, possible)

    def over_time(self, kept: list[int], decider: int) -> TimeResult | None:
        """Values by period, drift and forecasts of the kept policies by an estimator."""
        if self.time is None:
            return None
        assert self.sums.timed_weights is not None, "rows with times have it"
        names, weights = self.sums.policies, self.sums.timed_weights
        return self.time.result(
            self._timed(self.logged, self.value_range),
            {names[i]: self.timed(i, decider) for i in kept},
            {names[i]: weights.select([2 * i, 2 * i + 1]) for i in kept},
        )

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
        _, logged, unseen = self.logged
        estimate, over_time = finish(LOGGING, logged), self.over_time(kept, options.decider)
        return EvaluationResult(
            confidence=options.confidence,
            simultaneous_confidence=max(self.joint),
            reward_range=options.reward_range,
            n=self.sums.terms.n,
            users=self.users,
            logging=EstimatorResult(
                LOGGING.name, LOGGING.label, estimate, self.intervals(LOGGING, logged, unseen)
            ),
            decide_by=options.estimators[options.decider].name,
            policies={
                policies[i]: self.policy(i, support.get(policies[i]), over_time) for i in kept
            },
            comparisons=tuple(self.comparison(a, b) for a, b in combinations(kept, 2)),
            unsupported=tuple(policies[i] for i in left_out),
            propensities_estimated=options.propensities_estimated,
            logging_rewards={
                name: self.named_logging(i) for i, name in enumerate(options.reward_names)
            },
            time=over_time,
        )

    def named_logging(self, reward: int) -> EstimatorResult:
        """The logging policy's mean of a named reward."""
        assert self.sums.named is not None
        column = [self.named_columns(reward, 0).stop - 1]
        statistics = self.sums.named.select(column)
        estimate = finish(LOGGING, statistics)
        unseen = unseen_terms(LOGGING.terms, [LOGGED], reward_span(statistics), estimate.value)
        intervals = self.asymptotic_intervals(LOGGING, statistics, unseen)
        return EstimatorResult(LOGGING.name, LOGGING.label, estimate, intervals)

    def named_value(self, policy: int, reward: int) -> EstimatorResult:
        """A policy's value in a named reward."""
        assert self.sums.named is not None
        estimator = self.options.named_estimator
        every = self.named_columns(reward, policy)
        own = list(range(every.start, every.start + estimator.num_terms))
        statistics = self.sums.named.select(own, self.sums.weights[policy].statistics.weight_sum)
        paired = self.sums.named.select([*own, every.stop - 1])
        rewards = reward_span(self.sums.named.select([every.stop - 1]))
        estimate, difference = estimator.finish(statistics), Difference(estimator, LOGGING)
        extremes = [self.weight_spans[policy]], rewards, estimate.value, estimator.num_loggers
        return EstimatorResult(
            estimator.name,
            estimator.label,
            estimate,
            self.asymptotic_intervals(
                estimator, statistics, unseen_terms(estimator.terms, *extremes)
            ),
            self.gap(
                difference,
                paired,
                unseen_terms(_beside_logging(estimator), *extremes),
                self.joint[policy],
            ),
            estimator.consistent,
        )

    def named_columns(self, reward: int, policy: int) -> range:
        """Columns of a named reward from a policy's terms to the reward itself."""
        width, policies = self.options.named_estimator.num_terms, len(self.sums.policies)
        start = reward * (policies * width + 1)
        return range(start + policy * width, start + policies * width + 1)

    def policy(
        self, index: int, support: SupportDiagnostics | None, over_time: TimeResult | None
    ) -> PolicyEvaluation:
        options, sums, name = self.options, self.sums, self.sums.policies[index]
        results = [self.estimate(index, i) for i in range(len(options.estimators))]
        calibration, smoothing = sums.calibration[index], sums.smoothing[index]
        evidence = self.evidence(index, results[options.decider], support)
        value, difference = smoothing.value, smoothing.difference
        verdict = decide(evidence, options.gate)
        if over_time is not None:
            verdict = qualify(verdict, over_time, name, options.gate.margin)
        return PolicyEvaluation(
            policy=name,
            estimates={result.name: result for result in results},
            guaranteed_value=value(options.confidence) if self.independent else None,
            guaranteed_difference=difference(options.confidence) if self.independent else None,
            weights=evidence.weights,
            calibration=None if calibration is None else calibration.finish(),
            support=support,
            verdict=verdict,
            positions=evidence.positions,
            sensitivity=evidence.sensitivity,
            rewards={
                reward: self.named_value(index, i) for i, reward in enumerate(options.reward_names)
            },
        )

    def evidence(
        self, index: int, result: EstimatorResult, support: SupportDiagnostics | None = None
    ) -> Evidence:
        """What a verdict on a policy by this estimator's result is made of."""
        sums, gap = self.sums, result.difference
        assert gap is not None
        smoothing, positions = sums.smoothing[index], sums.positions[index]
        return Evidence(
            gap.estimate,
            gap.simultaneous,
            sums.weights[index].finish(),
            smoothing.difference(self.joint[index]) if self.independent else None,
            support,
            result.name,
            result.consistent,
            self.options.propensities_estimated,
            smoothing.mean_weight() if self.independent else None,
            self.users,
            () if positions is None else positions.finish(),
            self.sensitivity(index, gap),
            gap.rounding,
            sums.rewarded,
            self.difference_range,
            least_units(self.options.estimators[self.options.decider].controls),
        )

    def sensitivity(self, policy: int, gap: Gap) -> float | None:
        """By which factor estimated propensities may be wrong before the policy's side changes."""
        if not self.sums.sensitivity:
            return None
        logging = finish(LOGGING, self.terms.select(self.reward_column)).value
        half_width = 0.5 * (gap.simultaneous.high - gap.simultaneous.low)
        margin = self.options.gate.margin
        return self.sums.sensitivity[policy].largest_factor(logging, half_width, margin)

    @cached_property
    def logged(self) -> Terms:
        """The logging policy's value."""
        statistics = self.terms.select(self.reward_column)
        value = finish(LOGGING, statistics).value
        return LOGGING, statistics, unseen_terms(LOGGING.terms, [LOGGED], self.rewards, value)

    def own(self, policy: int, index: int) -> Terms:
        """A policy's value by an estimator."""
        return self._both(policy, index)[0]

    def paired(self, policy: int, index: int) -> Terms:
        """Its difference to the logging policy."""
        return self._both(policy, index)[1]

    def _both(self, policy: int, index: int) -> tuple[Terms, Terms]:
        """`own` and `paired`. Those of the last call are kept, as sums by user may be large."""
        if self._latest is None or self._latest[0] != (policy, index):
            self._latest = (policy, index), self._selected(policy, index)
        return self._latest[1]

    def _selected(self, policy: int, index: int) -> tuple[Terms, Terms]:
        estimator, weights = self.options.estimators[index], self.sums.weights[policy]
        columns = self.columns(policy, index)
        statistics = self.terms.select(columns, weights.statistics.weight_sum)
        value = estimator.finish(statistics).value
        return (
            (estimator, statistics, self._unseen(estimator.terms, policy, index, value)),
            (
                Difference(estimator, LOGGING),
                self.terms.select(columns + self.reward_column),
                self._unseen(_beside_logging(estimator), policy, index, value),
            ),
        )

    def _unseen(
        self, terms: Callable[[EvaluationRows], Array], policy: int, index: int, value: float
    ) -> Array:
        spans, loggers = [self.weight_spans[policy]], self.options.estimators[index].num_loggers
        return unseen_terms(terms, spans, self.rewards, value, loggers)

    def estimate(self, policy: int, index: int) -> EstimatorResult:
        estimator = self.options.estimators[index]
        _, statistics, unseen = self.own(policy, index)
        gap = self.gap(*self.paired(policy, index), self.joint[policy])
        return EstimatorResult(
            estimator.name,
            estimator.label,
            estimator.finish(statistics),
            self.intervals(estimator, statistics, unseen),
            gap.within(self.difference_range),
            estimator.consistent,
        )

    def comparison(self, first: int, second: int) -> Comparison:
        decider = self.options.decider
        estimator = self.options.estimators[decider]
        columns = self.columns(first, decider) + self.columns(second, decider)
        difference = Difference(estimator, estimator)
        spans = [self.weight_spans[first], self.weight_spans[second]]
        logging = float(self.terms.mean[self.reward_column[0]])
        loggers = estimator.num_loggers
        unseen = unseen_terms(difference.terms, spans, self.rewards, logging, loggers)
        joint = max(self.joint[first], self.joint[second])
        gap = self.gap(difference, self.terms.select(columns), unseen, joint)
        names = self.sums.policies
        return Comparison(
            names[first], names[second], estimator.name, gap.within(self.difference_range)
        )

    def gap(
        self, difference: Functional, statistics: Statistics, unseen: Array, joint: float
    ) -> Gap:
        assert isinstance(difference, Difference)
        terms = difference, statistics, unseen
        return Gap(
            finish(difference, statistics),
            self.interval(self.method, terms, self.options.confidence),
            self.interval(self.method, terms, joint),
            _rounding(difference, statistics),
        )

    def interval(self, method: str, terms: Terms, confidence: float) -> Interval:
        """An interval, widened where rows are correlated in time."""
        functional, statistics, unseen = terms
        found = _interval(method, functional, statistics, confidence, unseen)
        return found if self.time is None else self.time.widened(found, functional, statistics)

    def asymptotic_intervals(
        self, estimator: Estimator, statistics: Statistics, unseen: Array
    ) -> dict[str, Interval]:
        """Intervals that need no range of the terms; one that these rows do not define is left out,
        unless it is the main one."""
        out = {}
        for method in self.options.intervals:
            if method not in ASYMPTOTIC:
                continue
            try:
                terms = estimator, statistics, unseen
                out[method] = self.interval(method, terms, self.options.confidence)
            except UndefinedIntervalError:
                if method == self.options.intervals[0]:
                    raise
        return out

    def intervals(
        self, estimator: Estimator, statistics: Statistics, unseen: Array
    ) -> dict[str, Interval]:
        asymptotic = self.asymptotic_intervals(estimator, statistics, unseen)
        out, confidence = {}, self.options.confidence
        for method in self.options.intervals:
            if method in asymptotic:
                out[method] = asymptotic[method]
            elif method in ASYMPTOTIC:
                continue
            elif self.independent and estimator.num_terms == 1:
                bounds = estimator.bounds(self.options.reward_range, self.options.max_weight)
                unclustered = replace(statistics, users=None)
                out[method] = bernstein_interval(estimator, unclustered, bounds, confidence)
        if DEFAULT_METHOD in out and not self.slates:
            out[DEFAULT_METHOD] = out[DEFAULT_METHOD].within(*self.options.reward_range)
        return out


def _beside_logging(estimator: Estimator) -> Callable[[EvaluationRows], Array]:
    """Terms of the estimator and of the logging policy's value, side by side."""
    difference = Difference(estimator, LOGGING)
    return lambda rows: difference.terms(rows, rows)


def _interval(
    method: str, functional: Functional, statistics: Statistics, confidence: float, unseen: Array
) -> Interval:
    if method == "gamma":
        return gamma_interval(functional, statistics, confidence, unseen)
    make = bootstrap_interval if method == "bootstrap" else normal_interval
    return make(functional, statistics, confidence)


def _rounding(difference: Difference, statistics: Statistics) -> float:
    """Size of a difference that the rounding of log-probabilities explains.

    LOG_PROB_ROUNDING times the larger root mean square of what the two values are means of.
    """
    cut, columns = difference.first.num_terms, range(statistics.mean.size)
    statistics = replace(statistics, users=None)  # the scale is that of single rows
    scales = []
    for side, own in ((difference.first, columns[:cut]), (difference.second, columns[cut:])):
        found = finish(side, statistics.select(list(own)))
        scales.append(math.hypot(found.value, found.std_error * math.sqrt(found.n)))
    return LOG_PROB_ROUNDING * max(scales)
