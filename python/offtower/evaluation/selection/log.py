"""Input of the selectors: a log with dense policies, draws, or logged propensities only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike

from offtower.errors import OfftowerError
from offtower.evaluation.rows import Array, EvaluationRows, IntArray, ModelPredictions
from offtower.evaluation.selection.problem import Problem


@dataclass(frozen=True)
class DensePolicies:
    """All probabilities and predictions over a small catalogue: (n, A), `action` (n,)."""

    behavior: Array
    target: Array
    action: IntArray
    predictions: Mapping[str, Array]
    context: Array | None = None
    item_features: Array | None = None


@dataclass(frozen=True)
class BehaviorDraws:
    """S items a row drawn from the behavior policy: weights (n, S) and predictions (n, S)."""

    weight: Array
    predictions: Mapping[str, Array]


@dataclass(frozen=True)
class BehaviorPolicies:
    """The two or more policies behind a log, for the non-adaptive heuristic.

    row_policy: (n,) which of the P policies logged the row. probability: (n, P) each policy's
    probability of the logged item. expected_reward: per reward model (n, P), each policy's expected
    prediction in the row's context.
    """

    row_policy: IntArray
    probability: Array
    expected_reward: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class SelectionLog:
    """A log and a target policy. Build it with one of the `from_` methods.

    problem: the logged rows. source: of importance fitting; None where only the logged propensities
    are known. policies: for the heuristic. independent_models: the reward models that did not learn
    from these rows; the others' errors are correlated with the log's own noise, and a bias that the
    log cannot show is then not taken to be zero.
    """

    problem: Problem
    source: DensePolicies | BehaviorDraws | None = None
    policies: BehaviorPolicies | None = None
    independent_models: frozenset[str] = frozenset()

    @classmethod
    def from_policies(
        cls,
        action: ArrayLike,
        reward: ArrayLike,
        behavior: ArrayLike,
        target: ArrayLike,
        reward_models: Mapping[str, ArrayLike] | None = None,
        *,
        context: ArrayLike | None = None,
        item_features: ArrayLike | None = None,
        row_policy: ArrayLike | None = None,
        policies: ArrayLike | None = None,
        independent_models: frozenset[str] = frozenset(),
        model_parameters: Mapping[str, float] | None = None,
    ) -> SelectionLog:
        """A log whose policies are known over the whole (small) catalogue.

        action: (n,) int. reward: (n,). behavior, target: (n, A) probabilities; for a log of several
        policies `behavior` is their mixture by share of rows. reward_models: predictions (n, A) by
        name, cross-fitted where they learned from this log. context (n, d) and item_features (A, e)
        are for the network fit only. row_policy (n,) and policies (P, n, A): which policy logged a
        row and what each would have done, for the heuristic. model_parameters: by name, how many
        parameters a model learned from this log (`ModelPredictions.parameters`).
        Raises OfftowerError where shapes differ or a logged action has behavior 0.
        """
        pi_b, pi_e = _policies(behavior, target)
        n, n_items = pi_b.shape
        logged = _integers(action, "action", n, n_items)
        rewards = _array(reward, "reward", (n,))
        rows = np.arange(n)
        if np.any(pi_b[rows, logged] <= 0.0):
            bad = int(np.flatnonzero(pi_b[rows, logged] <= 0.0)[0])
            raise OfftowerError(
                f"row {bad} logged item {int(logged[bad])}, to which behavior gives probability 0."
            )
        predictions = {
            name: _array(values, f"reward model {name!r}", (n, n_items))
            for name, values in (reward_models or {}).items()
        }
        learned = model_parameters or {}
        models = {
            name: ModelPredictions(
                q[rows, logged], np.einsum("ij,ij->i", pi_e, q), float(learned.get(name, 0.0))
            )
            for name, q in predictions.items()
        }
        several = None
        if policies is not None or row_policy is not None:
            if policies is None or row_policy is None:
                raise OfftowerError("give both row_policy (n,) and policies (P, n, A), or neither.")
            stack = np.asarray(policies, dtype=np.float64)
            if stack.ndim != 3 or stack.shape[1:] != (n, n_items):
                raise OfftowerError(
                    f"policies has shape {stack.shape}, expected (P, {n}, {n_items})."
                )
            several = BehaviorPolicies(
                _integers(row_policy, "row_policy", n, stack.shape[0]),
                np.ascontiguousarray(stack[:, rows, logged].T),
                {name: np.einsum("pij,ij->ip", stack, q) for name, q in predictions.items()},
            )
        source = DensePolicies(
            pi_b,
            pi_e,
            logged,
            predictions,
            None if context is None else np.asarray(context, dtype=np.float64),
            None if item_features is None else np.asarray(item_features, dtype=np.float64),
        )
        weight = importance_weights(pi_b, pi_e)[rows, logged]
        return cls(Problem(weight, rewards, models), source, several, independent_models)

    @classmethod
    def from_draws(
        cls,
        weight: ArrayLike,
        reward: ArrayLike,
        draw_weight: ArrayLike,
        reward_models: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]] | None = None,
        *,
        policies: BehaviorPolicies | None = None,
        independent_models: frozenset[str] = frozenset(),
    ) -> SelectionLog:
        """A log over a large catalogue, its behavior policy known through draws.

        weight: (n,) target / behavior of the logged items; draw_weight: (n, S) the same at S items
        drawn from the behavior policy (about 100 a row). reward_models: by name (prediction of the
        logged item (n,), expected prediction under the target (n,), predictions at the draws (n,
        S)). Draws may be float32 or memory-mapped; they are read in chunks.
        """
        models = reward_models or {}
        terms = {name: (logged, expected) for name, (logged, expected, _) in models.items()}
        log = cls.from_propensities(
            weight, reward, terms, policies=policies, independent_models=independent_models
        )
        draws = np.asarray(draw_weight)
        if draws.ndim != 2 or draws.shape[0] != log.problem.n:
            raise OfftowerError(
                f"draw_weight has shape {draws.shape}, expected ({log.problem.n}, S)."
            )
        at_draws = {name: np.asarray(drawn) for name, (_, _, drawn) in models.items()}
        for name, drawn in at_draws.items():
            if drawn.shape != draws.shape:
                raise OfftowerError(
                    f"reward model {name!r}, draws: shape {drawn.shape}, expected {draws.shape}."
                )
        return replace(log, source=BehaviorDraws(draws, at_draws))

    @classmethod
    def from_propensities(
        cls,
        weight: ArrayLike,
        reward: ArrayLike,
        reward_models: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
        *,
        policies: BehaviorPolicies | None = None,
        independent_models: frozenset[str] = frozenset(),
    ) -> SelectionLog:
        """A log with the logged items' propensities only.

        weight, reward: (n,). reward_models: by name (prediction of the logged item, expected
        prediction under the target), each (n,). PAS-IF then uses one pooled multiplier and cannot
        rank candidates that read a reward model.
        """
        n = np.asarray(reward).shape[0]
        models = {
            name: ModelPredictions(
                _array(logged, f"reward model {name!r}, logged items", (n,)),
                _array(expected, f"reward model {name!r}, expected", (n,)),
            )
            for name, (logged, expected) in (reward_models or {}).items()
        }
        weights, rewards = _array(weight, "weight", (n,)), _array(reward, "reward", (n,))
        return cls(Problem(weights, rewards, models), None, policies, independent_models)

    @classmethod
    def from_rows(
        cls,
        rows: EvaluationRows | Mapping[str, EvaluationRows],
        *,
        draws: BehaviorDraws | None = None,
        policies: BehaviorPolicies | None = None,
        independent_models: frozenset[str] = frozenset(),
    ) -> SelectionLog:
        """A log from the rows that estimators take, one set for each reward model (by its name).

        rows: by model name those of the same logged rows, or one EvaluationRows; its reward model,
        if it has one, is called "model". draws: the behavior policy's draws, with predictions by
        the same names; without them PAS-IF pools its multiplier, as in `from_propensities`.
        Raises OfftowerError where the sets differ in weights or rewards, or a set lacks its terms.
        """
        single = isinstance(rows, EvaluationRows)
        named = {"model": rows} if isinstance(rows, EvaluationRows) else dict(rows)
        if not named:
            raise OfftowerError("from_rows needs at least one set of rows.")
        first = next(iter(named.values()))
        models: dict[str, ModelPredictions] = {}
        for name, part in named.items():
            same = np.array_equal(part.importance_weight, first.importance_weight)
            if not same or not np.array_equal(part.reward, first.reward):
                raise OfftowerError(
                    f"the rows of reward model {name!r} have other weights or rewards than those "
                    f"of {next(iter(named))!r}: score the same log in the same order."
                )
            if part.action_reward is not None and part.expected_reward is not None:
                models[name] = ModelPredictions(part.action_reward, part.expected_reward)
            elif not single:
                raise OfftowerError(
                    f"the rows of reward model {name!r} lack action_reward or expected_reward."
                )
        if draws is not None:
            missing = sorted(set(models) - set(draws.predictions))
            if missing:
                raise OfftowerError(f"the draws lack predictions of: {', '.join(missing)}.")
            if draws.weight.shape[0] != first.n:
                raise OfftowerError(
                    f"the draws have {draws.weight.shape[0]} rows and the log {first.n}."
                )
        problem = Problem(first.importance_weight, first.reward, models)
        return cls(problem, draws, policies, independent_models)


def _array(values: ArrayLike, name: str, shape: tuple[int, ...]) -> Array:
    array = np.ascontiguousarray(values, dtype=np.float64)
    if array.shape != shape:
        raise OfftowerError(f"{name} has shape {array.shape}, expected {shape}.")
    if not np.all(np.isfinite(array)):
        raise OfftowerError(f"{name} holds non-finite numbers.")
    return array


def _integers(values: ArrayLike, name: str, n: int, limit: int) -> IntArray:
    array = np.asarray(values)
    if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
        raise OfftowerError(
            f"{name} has shape {array.shape} and dtype {array.dtype}, expected ({n},) integers."
        )
    if array.min() < 0 or array.max() >= limit:
        raise OfftowerError(f"{name} must lie in 0..{limit - 1}.")
    return array.astype(np.int64)


def importance_weights(behavior: Array, target: Array) -> Array:
    """target / behavior, 0 where behavior is 0 (such a pair cannot be in the log)."""
    return np.divide(target, behavior, out=np.zeros_like(target), where=behavior > 0.0)


def _policies(behavior: ArrayLike, target: ArrayLike) -> tuple[Array, Array]:
    """The two policies as float64 (n, A); OfftowerError where they are not distributions."""
    pi_b = np.ascontiguousarray(behavior, dtype=np.float64)
    pi_e = np.ascontiguousarray(target, dtype=np.float64)
    for name, policy in (("behavior", pi_b), ("target", pi_e)):
        if policy.ndim != 2 or 0 in policy.shape:
            raise OfftowerError(f"{name} has shape {policy.shape}, expected (n, A) probabilities.")
        if not np.all(np.isfinite(policy)) or policy.min() < 0.0:
            raise OfftowerError(f"{name} holds negative or non-finite probabilities.")
        off = np.abs(policy.sum(axis=1) - 1.0)
        if off.max() > 1e-4:
            row = int(off.argmax())
            raise OfftowerError(
                f"{name} row {row} sums to {policy[row].sum():.6g}, expected 1: pass probabilities "
                "over all items."
            )
    if pi_b.shape != pi_e.shape:
        raise OfftowerError(f"behavior has shape {pi_b.shape} and target {pi_e.shape}.")
    return pi_b, pi_e
