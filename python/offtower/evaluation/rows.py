"""Input of the estimators: weight, reward and model predictions of each logged row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.data.rounds import Rounds
from offtower.errors import DataError

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EvaluationRows:
    """The logged rows of one target policy, arrays of length n, checked when made.

    Attributes:
        importance_weight: w_i = pi_e(a_i|x_i) / pscore_i, not negative. May be given as None
            together with `log_weight`.
        reward: r_i.
        action_reward: q(x_i, a_i) of the reward model; None without one.
        expected_reward: m_i = sum_a pi_e(a|x_i) q(x_i, a); None without a reward model.
        user: integer key of the user of each row, for intervals by user.
        row: integer key of each row, unique in the log. Bootstrap weights are keyed by it, so that
            shards of a log can be evaluated apart and merged. Without it rows count from 0.
        log_weight: log w_i.
        cluster_weight: pi_e(c_i|x_i) / pi_0(c_i|x_i) with c_i the cluster of the logged item, for
            marginalised IPS; `estimators.cluster_weight` makes it from probabilities.
        round: integer key of the slate of each row; consecutive rows with one key are a slate, in
            the order of its positions. Values are then means over rounds of sums over positions,
            and every statistic counts rounds. Weights are those of the items down to the row's
            position, prod_{j<=k} rho_j (cascade), or another interaction's; with a reward model
            expected_reward is E_pi[q | x, a_<k].
        earlier_weight: prod_{j<k} rho_j, 1 at position 0; with `round`, for DR.
        slate_weight: prod_j rho_j over the whole slate, for the interaction `standard`.
        row_weight: known weight of each row, 1 / the share of such rows that a down-sampled log
            kept; means are self-normalized by it (`intervals.statistics.Statistics`).
        logger: number of the behavior policy that logged each row, from 0, for the estimators of
            logs of several (`estimators.loggers`).
        rewards: (n, R) named rewards, whose weighted sum `reward` is; each is evaluated beside it.
        time: when each row was logged, in whole microseconds since 1970 or any other whole numbers,
            for values by period (`offtower.evaluation.drift`).

    Raises:
        DataError: lengths differ, a number is NaN or infinite, a weight is negative, a key is not
            an integer.
    """

    importance_weight: Array
    reward: Array
    action_reward: Array | None = None
    expected_reward: Array | None = None
    user: IntArray | None = None
    row: IntArray | None = None
    log_weight: Array | None = None
    cluster_weight: Array | None = None
    round: IntArray | None = None
    earlier_weight: Array | None = None
    slate_weight: Array | None = None
    row_weight: Array | None = None
    rewards: Array | None = None
    logger: IntArray | None = None
    time: IntArray | None = None

    def __post_init__(self) -> None:
        if self.importance_weight is None:
            if self.log_weight is None:
                raise DataError("rows need importance_weight or log_weight; both are missing")
            with np.errstate(over="ignore"):
                weight = np.exp(_numbers(self.log_weight, "log_weight", infinite=True))
            object.__setattr__(self, "importance_weight", weight)
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                if field.name == "reward":
                    raise DataError("rows need rewards; reward is missing")
                continue
            if field.name in ("user", "row", "round", "logger", "time"):
                value = _keys(value, field.name)
            elif field.name == "rewards":
                value = np.stack([_numbers(one, "rewards") for one in np.transpose(value)], axis=1)
            else:
                value = _numbers(value, field.name, infinite=field.name == "log_weight")
            object.__setattr__(self, field.name, value)
        for name in ("importance_weight", "cluster_weight", "earlier_weight", "slate_weight"):
            weight = getattr(self, name)
            if weight is not None:
                _refuse(weight < 0.0, weight, name, "a number that is not negative")
        if self.row_weight is not None:
            weight = self.row_weight
            _refuse(weight <= 0.0, weight, "row_weight", "a number above 0")
            if self.round is not None:
                raise DataError("rows of slates cannot have weights (row_weight)")
        n = self.reward.shape[0]
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value.shape[0] != n:
                raise DataError(
                    f"columns of rows differ in length: reward has {n}, "
                    f"{field.name} has {value.shape[0]}"
                )

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.reward.shape[0])

    def __len__(self) -> int:
        return self.n

    @cached_property
    def rounds(self) -> Rounds | None:
        """The slates; None where every row stands for itself."""
        return None if self.round is None else Rounds.of(self.round)

    @property
    def units(self) -> int:
        """Number of rounds of slates, else of rows: what a value is a mean over."""
        return self.n if self.rounds is None else len(self.rounds)

    def summed(self, values: Array) -> Array:
        """Sums over the positions of each round, (n, ...) -> (units, ...)."""
        return values if self.rounds is None else self.rounds.sum(values)

    def of_unit(self, column: IntArray) -> IntArray:
        """A key (n,) of each unit: that of a round's first row."""
        return column if self.rounds is None else column[self.rounds.first]

    @cached_property
    def mean_weight(self) -> Array:
        """(n,) weights divided by the positions of their round: summed, a unit's mean weight."""
        if self.rounds is None:
            return self.importance_weight
        return self.importance_weight / np.repeat(self.rounds.lengths, self.rounds.lengths)

    @property
    def share_of_unit(self) -> Array:
        """(n,) 1 divided by the positions of the row's round: summed, 1 for each unit."""
        if self.rounds is None:
            return np.ones(self.n)
        return np.repeat(1.0 / self.rounds.lengths, self.rounds.lengths)

    def standard(self) -> EvaluationRows:
        """The rows weighted by whole slates. Raises DataError without `slate_weight`."""
        if self.slate_weight is None:
            raise DataError(
                "the interaction 'standard' needs the weights of whole slates (slate_weight)"
            )
        return replace(self, importance_weight=self.slate_weight, log_weight=None)

    def with_position_weights(self, weights: Sequence[float]) -> EvaluationRows:
        """The rows with the values of each position k of their slates times weights[k].

        Then the value of a round is sum_k weights[k] r_k.

        Raises:
            DataError: the rows are no slates, or one is longer than `weights`.
        """
        if self.rounds is None or self.rounds.longest > len(weights):
            longest = 0 if self.rounds is None else self.rounds.longest
            raise DataError(
                f"{len(weights)} weights of positions for slates of up to {longest} items: give "
                "one for each position, and rows with `round`"
            )
        alpha = np.asarray(weights, dtype=np.float64)[self.rounds.position]

        def times(values: Array | None) -> Array | None:
            return None if values is None else values * alpha

        return replace(
            self,
            reward=self.reward * alpha,
            action_reward=times(self.action_reward),
            expected_reward=times(self.expected_reward),
            rewards=None if self.rewards is None else self.rewards * alpha[:, None],
        )

    def with_reward(self, index: int) -> EvaluationRows:
        """The rows with the named reward of this number in place of their sum."""
        assert self.rewards is not None, "callers check that there are named rewards"
        return replace(self, reward=self.rewards[:, index])

    def by_row(self) -> EvaluationRows:
        """The same rows without their rounds."""
        return replace(self, round=None, earlier_weight=None, slate_weight=None)

    def take(self, index: Any) -> EvaluationRows:
        """Rows at `index`: positions, a mask or a slice."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {
            name: None if column is None else column[index] for name, column in columns.items()
        }
        return EvaluationRows(**taken)

    @classmethod
    def concatenate(cls, parts: Sequence[EvaluationRows]) -> EvaluationRows:
        """All rows of all parts; columns that some part lacks are left out."""
        if not parts:
            raise DataError("the log has no rows to evaluate on")
        columns: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            lacking = any(value is None for value in values)
            columns[field.name] = None if lacking else np.concatenate(values)
        return cls(**columns)


@dataclass(frozen=True, eq=False)
class ModelPredictions:
    """A reward model on n logged rows: q(x_i, a_i) and sum_a pi_e(a|x_i) q(x_i, a), both (n,).

    parameters: effective number of those that the model learned from these very rows, cross-fitted
    (the length of its coefficient vector for a linear model); 0 where it learned from another log,
    or where nothing is known.
    """

    action_reward: Array
    expected_reward: Array
    parameters: float = 0.0

    def examined(self, factor: Array | None) -> ModelPredictions:
        """The predictions times (n,) factors of the rows' positions; None is 1."""
        if factor is None:
            return self
        return replace(
            self,
            action_reward=self.action_reward * factor,
            expected_reward=self.expected_reward * factor,
        )

    def certain(self, shown: NDArray[np.bool_]) -> ModelPredictions:
        """The predictions where the policy shows the items of the rows `shown` (n,)."""
        expected = np.where(shown, self.action_reward, self.expected_reward)
        return replace(self, expected_reward=expected)


def _numbers(values: Any, name: str, infinite: bool = False) -> Array:
    try:
        array = np.ascontiguousarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be an array of numbers: {error}") from None
    if array.ndim != 1:
        raise DataError(f"{name} must have one dimension (rows), but has shape {array.shape}")
    if infinite:
        _refuse(np.isnan(array), array, name, "a number")
    else:
        _refuse(~np.isfinite(array), array, name, "a finite number")
    return array


def _keys(values: Any, name: str) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{name} must be a list of integer keys, but is an array of {array.dtype} with shape "
            f"{array.shape}; give texts an integer code or a 64-bit hash first"
        )
    return array.astype(np.int64, copy=False)


def _refuse(bad: NDArray[np.bool_], values: Array, name: str, expected: str) -> None:
    count = int(np.count_nonzero(bad))
    if count:
        first = int(np.argmax(bad))
        raise DataError(
            f"{name}[{first}] is {values[first]}, expected {expected} ({count} such "
            f"value{'s' if count > 1 else ''} in {values.shape[0]} rows)"
        )
