"""The pseudo problem of a split: the pseudo-behavior part as an estimator sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.rows import Array, ModelPredictions
from offtower.evaluation.samples import joined
from offtower.evaluation.selection.exact import solve_multiplier
from offtower.evaluation.selection.log import BehaviorDraws, DensePolicies, SelectionLog
from offtower.evaluation.selection.network import NetworkOptions, fit_network
from offtower.evaluation.selection.problem import Problem
from offtower.evaluation.selection.splits import (
    MIN_DRAWS,
    fit_split_draws,
    fit_split_pooled,
    importance_weights,
)

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class PseudoProblem:
    """A split and the problem that it poses to the estimators.

    rho: (n,) probability that row i goes to the pseudo-target part. problem: weights and
    predictions of row i if it lands in the pseudo-behavior part. The weight is the joint ratio
    rho (1 - P) / ((1 - rho) P), P = E[p(x)]: it equals the pseudo weight w~ where p(x) is constant,
    and corrects for the parts' different contexts where it is not; expected rewards carry the same
    correction p (1 - P) / ((1 - p) P). weight_error: mean squared distance of w~ from the weights.
    notes: for the reader of the result.
    """

    rho: Array
    problem: Problem
    share: float
    weight_error: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Split:
    """rho of the logged items, p(x), and by model the mean prediction on the pseudo target."""

    rho: Array
    p: Array
    expected: dict[str, Array]


def pseudo_problem(
    log: SelectionLog,
    *,
    share: float,
    importance_fit: str = "exact",
    network: NetworkOptions | None = None,
    seed: int = 0,
    min_draws: int = MIN_DRAWS,
) -> PseudoProblem:
    """Fit rho once and set up the pseudo problem, from which splits are drawn."""
    source = log.source
    if importance_fit not in ("exact", "network"):
        raise OfftowerError(f"unknown importance_fit {importance_fit!r}; use 'exact' or 'network'.")
    if importance_fit == "network":
        if not isinstance(source, DensePolicies):
            raise OfftowerError(
                "importance_fit='network' needs policies over all items "
                "(SelectionLog.from_policies); use importance_fit='exact' here."
            )
        return _network(log, source, share, network or NetworkOptions(), seed)
    if source is None:
        rho = fit_split_pooled(log.problem.weight, share)
        note = (
            "only logged propensities are known: one multiplier is pooled over contexts, the share"
            " p(x) varies with the context"
        )
        overall = float(rho.mean())
        weight = rho / (1.0 - rho) * ((1.0 - overall) / overall)
        error = float(np.mean((weight - log.problem.weight) ** 2))
        return PseudoProblem(rho, Problem(weight, log.problem.reward), share, error, (note,))
    if isinstance(source, DensePolicies):
        parts = _chunks(*source.behavior.shape)
        return _problem(log, (_dense_split(source, part, share) for part in parts), share)
    draws = source.weight.shape[1]
    parts = _chunks(*source.weight.shape)
    found = _problem(log, (_draws_split(log, source, p, share, min_draws) for p in parts), share)
    return replace(found, notes=(f"rho fitted on {draws} draws per context",))


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _dense_split(source: DensePolicies, part: slice, share: float) -> _Split:
    behavior = source.behavior[part]
    weight = importance_weights(behavior, source.target[part])
    return _reduced(source, part, solve_multiplier(weight, behavior, share).apply(weight))


def _reduced(source: DensePolicies, part: slice, full: Array) -> _Split:
    """Reduce rho (rows, A) of some rows to what the rows need."""
    mass = source.behavior[part] * full
    p = mass.sum(axis=1)
    expected = {
        name: np.einsum("ij,ij->i", mass, prediction[part]) / p
        for name, prediction in source.predictions.items()
    }
    return _Split(full[np.arange(full.shape[0]), source.action[part]], p, expected)


def _draws_split(
    log: SelectionLog, source: BehaviorDraws, part: slice, share: float, min_draws: int
) -> _Split:
    rho, drawn = fit_split_draws(
        log.problem.weight[part], source.weight[part], share, min_draws=min_draws
    )
    p = drawn.mean(axis=1)
    expected = {
        name: (drawn * prediction[part]).mean(axis=1) / p
        for name, prediction in source.predictions.items()
    }
    return _Split(rho, p, expected)


def _network(
    log: SelectionLog, source: DensePolicies, share: float, options: NetworkOptions, seed: int
) -> PseudoProblem:
    if source.context is None:
        raise OfftowerError(
            "importance_fit='network' needs the contexts: SelectionLog.from_policies(context=...)."
        )
    fit = fit_network(
        source.behavior,
        source.target,
        source.action,
        source.context,
        source.item_features,
        share=share,
        options=options,
        seed=seed,
    )
    split = _reduced(source, slice(0, log.problem.n), fit.rho)
    notes = [f"network fit: lambda = {fit.chosen:g}, mean p(x) = {split.p.mean():.3f}"]
    if not fit.qualified:
        notes.append(
            f"no lambda kept the mean share within {options.tolerance:g} of {share:g}; the nearest "
            "was taken"
        )
    return replace(_problem(log, [split], share), notes=tuple(notes))


def _problem(log: SelectionLog, splits: Iterable[_Split], share: float) -> PseudoProblem:
    split = joined(list(splits))
    # p(x) averages over items as well, so its mean is the less noisy estimate of P = E[rho]
    overall = float(split.p.mean())
    odds = (1.0 - overall) / overall
    weight = split.rho / (1.0 - split.rho) * odds
    context_weight = split.p / (1.0 - split.p) * odds
    models = {
        name: ModelPredictions(log.problem.models[name].action_reward, value * context_weight)
        for name, value in split.expected.items()
    }
    error = float(np.mean((weight / context_weight - log.problem.weight) ** 2))
    return PseudoProblem(split.rho, Problem(weight, log.problem.reward, models), share, error)
