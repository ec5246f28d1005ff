"""Base class of the estimators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.intervals.betting import betting_interval
from offtower.evaluation.intervals.gamma import gamma_interval
from offtower.evaluation.intervals.linear import LinearFunctional
from offtower.evaluation.intervals.methods import (
    DEFAULT_REPLICATES,
    Interval,
    bernstein_interval,
    bootstrap_interval,
    check_method,
    normal_interval,
)
from offtower.evaluation.intervals.regression import Control, adjusted
from offtower.evaluation.intervals.smoothing_bound import SmoothingSums, check_range
from offtower.evaluation.intervals.statistics import (
    Estimate,
    Functional,
    Statistics,
    collect,
    finish,
    fit,
)
from offtower.evaluation.intervals.unseen import reward_span, unseen_terms, weight_span
from offtower.evaluation.rows import Array, EvaluationRows

_LARGE = 1e140
"""Weights whose squares, summed over many rows, could overflow."""


@dataclass(frozen=True)
class Estimator(ABC):
    """A smooth function of the means of per-row terms.

    Subclasses give `terms`, and where the value is not simply their mean `combine` and `gradient`.
    """

    label: ClassVar[str]
    """Name in a registry, a config or a report."""
    needs_reward_model: ClassVar[bool] = False
    """Reads action_reward and expected_reward."""
    uses_weight: ClassVar[bool] = True
    scale_free: ClassVar[bool] = False
    """The value does not change where all importance weights are multiplied by a number."""
    num_terms: ClassVar[int] = 1
    consistent: ClassVar[bool] = False
    """Tends to the policy's value, given true propensities and full support."""
    controls: ClassVar[tuple[Control, ...]] = ()
    """Terms of known mean, by which the value is adjusted (`intervals.regression`)."""

    @property
    def name(self) -> str:
        """The label with the parameters: clipped_ips(max_weight=10)."""
        shown = ", ".join(f"{f.name}={getattr(self, f.name):g}" for f in fields(self))
        return f"{self.label}({shown})" if shown else self.label

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(f.name for f in fields(cls))

    @abstractmethod
    def terms(self, rows: EvaluationRows) -> Array:
        """(n, k) terms of the rows."""

    def combine(self, mean: Array) -> Array:
        """(..., k) means of the terms -> (...) values."""
        return mean[..., 0]

    def gradient(self, mean: Array) -> Array:
        """(k,) means -> (k,) derivative of the value."""
        return np.ones(1)

    @property
    def num_loggers(self) -> int:
        """Behavior policies that the estimator tells apart."""
        return 1

    @property
    def takes_coefficients(self) -> bool:
        """Whether the sums choose coefficients of the estimator (`fitted`)."""
        return bool(self.controls)

    def fitted(self, statistics: Statistics) -> Functional:
        """The estimator with the coefficients that it takes from the sums; itself without any."""
        return adjusted(self, self.controls, statistics) if self.controls else self

    def contributions(self, rows: EvaluationRows) -> Array:
        """(units,) numbers whose mean is the value and whose spread gives its variance.

        For a mean these are its terms; for a ratio, value + gradient . (terms - means), the latter
        times the row's weight over the mean one where rows have weights.
        """
        terms = rows.summed(self.terms(rows))
        statistics = self.statistics(rows)
        mean, functional = statistics.mean, fit(self, statistics)
        self._check_support(float(rows.importance_weight.sum()))
        influence = (terms - mean) @ functional.gradient(mean)
        if rows.row_weight is not None:
            influence = influence * (rows.row_weight / rows.row_weight.mean())
        if isinstance(functional, LinearFunctional):
            influence = influence * functional.error_factor
        return functional.combine(mean) + influence

    def statistics(
        self,
        rows: EvaluationRows,
        *,
        by_user: bool = False,
        replicates: int = 0,
        seed: int = 0,
        grouped: bool = False,
    ) -> Statistics:
        """Mergeable sums of a shard; see `statistics.collect`."""
        return collect(
            self.terms(rows),
            rows,
            by_user=by_user,
            replicates=replicates,
            seed=seed,
            grouped=grouped or bool(self.controls),
        )

    def finish(self, statistics: Statistics) -> Estimate:
        """Value and standard error of merged statistics.

        Raises OfftowerError without rows, or where every importance weight is 0.
        """
        if statistics.n:
            self._check_support(statistics.weight_sum)
        return finish(self, statistics)

    def estimate(self, rows: EvaluationRows) -> Estimate:
        """Value and standard error. Raises OfftowerError as `finish`."""
        return self.finish(self.statistics(self._scaled(rows)))

    def interval(
        self,
        rows: EvaluationRows,
        confidence: float = 0.95,
        method: str = "normal",
        *,
        by_user: bool = False,
        replicates: int = DEFAULT_REPLICATES,
        seed: int = 0,
        reward_range: tuple[float, float] | None = None,
        max_weight: float | None = None,
    ) -> Interval:
        """Two-sided confidence interval; `intervals.methods` lists the methods.

        by_user: rows of one user are correlated ("gamma", "normal" and "bootstrap").
        replicates, seed: of the bootstrap.
        reward_range: for "bernstein", "log_smoothing" and "betting", and for "gamma" where all
        rewards are equal. max_weight: largest possible weight, for "bernstein" and, if known, for
        "gamma"; the largest one seen in the log is not it.
        """
        check_method(method)
        rows = self._scaled(rows)
        if method in ("log_smoothing", "betting"):
            return self._bounded(method, rows, confidence, reward_range, by_user)
        if method == "gamma":
            return self._gamma(rows, confidence, by_user, reward_range, max_weight)
        carried = replicates if method == "bootstrap" else 0
        statistics = self.statistics(rows, by_user=by_user, replicates=carried, seed=seed)
        if statistics.n:
            self._check_support(statistics.weight_sum)
        if method == "normal":
            return normal_interval(self, statistics, confidence)
        if method == "bootstrap":
            return bootstrap_interval(self, statistics, confidence)
        if reward_range is None:
            raise OfftowerError("a bernstein interval needs reward_range=(low, high)")
        if rows.rounds is not None:
            raise OfftowerError(
                "a bernstein interval bounds the terms of rows, not their sums over the positions "
                "of slates; use 'normal' or 'bootstrap'"
            )
        bounds = self.bounds(check_range(reward_range), max_weight)
        return bernstein_interval(self, statistics, bounds, confidence)

    def bounds(
        self, reward_range: tuple[float, float], max_weight: float | None
    ) -> tuple[float, float]:
        """Least and largest possible term, for `bernstein`."""
        raise OfftowerError(
            f"{self.name} is not a mean of bounded terms: a bernstein interval does not exist; "
            "use 'normal' or 'bootstrap', or another estimator"
        )

    def _gamma(
        self,
        rows: EvaluationRows,
        confidence: float,
        by_user: bool,
        reward_range: tuple[float, float] | None,
        max_weight: float | None,
    ) -> Interval:
        statistics = self.statistics(rows, by_user=by_user, grouped=True)
        value = self.finish(statistics).value
        weights = collect(rows.mean_weight[:, None], rows, by_user=by_user)
        rewards = reward_span(collect(rows.reward[:, None], rows), reward_range)
        spans = [weight_span(weights, max_weight)]
        unseen = unseen_terms(self.terms, spans, rewards, value, self.num_loggers)
        return gamma_interval(self, statistics, confidence, unseen)

    def _bounded(
        self,
        method: str,
        rows: EvaluationRows,
        confidence: float,
        reward_range: tuple[float, float] | None,
        by_user: bool,
    ) -> Interval:
        if self.label not in ("ips", "log_smoothing"):
            raise OfftowerError(
                f"the {method} interval uses weights and rewards only, not {self.name}; "
                "ask IPS or LogSmoothing for it"
            )
        if reward_range is None or by_user or rows.rounds is not None:
            raise OfftowerError(
                f"a {method} interval needs reward_range=(low, high) and independent rows "
                "(no form by user or by round)"
            )
        if rows.row_weight is not None:
            raise OfftowerError(
                f"a {method} interval has no form for rows with weights; use 'normal' or "
                "'bootstrap'"
            )
        if method == "betting":
            return betting_interval(rows, confidence, reward_range)
        return SmoothingSums.of(rows, reward_range).value(confidence)

    def _scaled(self, rows: EvaluationRows) -> EvaluationRows:
        """The rows with weights whose squares do not overflow, where their scale is free."""
        top = float(rows.importance_weight.max(initial=0.0))
        if not self.scale_free or top < _LARGE:
            return rows
        # A power of two scales exactly.
        shift = int(np.frexp(top)[1])
        return replace(rows, importance_weight=np.ldexp(rows.importance_weight, -shift))

    def _check_support(self, weight_sum: float) -> None:
        if self.uses_weight and weight_sum == 0.0:
            raise OfftowerError(
                f"{self.label} has no value: every importance weight is 0, so the log holds no "
                "action that the target policy takes"
            )

    def _check_parameter(self, name: str, low: float, high: float = np.inf) -> None:
        value: Any = getattr(self, name)
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise OfftowerError(
                f"{self.label}: {name} must be a number in [{low:g}, {high:g}], but is {value!r}"
            )


def reward_terms(rows: EvaluationRows, label: str) -> tuple[Array, Array]:
    """q_i and m_i. Raises OfftowerError where the rows lack them."""
    if rows.action_reward is None or rows.expected_reward is None:
        raise OfftowerError(
            f"{label} needs a reward model: give the rows action_reward (q of the logged action) "
            "and expected_reward (mean of q under the target policy), or choose an estimator "
            "without one, such as snips"
        )
    return rows.action_reward, rows.expected_reward


def expected_terms(
    rows: EvaluationRows, expected_reward: Array, weight: Callable[[Array], Array]
) -> Array:
    """(n,) m_i; in a slate f(w_{1:k-1}) E_pi[q | x, a_<k], the weight of position 0 being 1.

    weight: the map f. Raises OfftowerError for slates without the weights of earlier positions.
    """
    if rows.rounds is None:
        return expected_reward
    if rows.earlier_weight is None:
        raise OfftowerError(
            "doubly robust estimators of slates need earlier_weight, the weights of the positions "
            "above each row: log conditional pscores"
        )
    earlier = np.where(rows.rounds.position == 0, 1.0, weight(rows.earlier_weight))
    return earlier * expected_reward


def need_max_weight(label: str, max_weight: float | None) -> float:
    """Largest possible weight. Raises OfftowerError where a bound needs it and it is missing."""
    if max_weight is None or not max_weight > 0.0 or not np.isfinite(max_weight):
        raise OfftowerError(
            f"a bernstein interval of {label} needs max_weight, the largest weight that can occur "
            "(at most 1 over the least logging probability); the largest weight seen is not enough"
        )
    return float(max_weight)
