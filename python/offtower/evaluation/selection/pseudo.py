"""The pseudo problem of a split: how the pseudo-behaviour part looks to an estimator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.selection.exact import solve_multiplier
from offtower.evaluation.selection.log import BehaviorDraws, DensePolicies, SelectionLog
from offtower.evaluation.selection.network import NetworkFit, NetworkOptions, fit_network
from offtower.evaluation.selection.problem import Array, ModelPredictions, Problem
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
    reward-model terms of row i if it lands in the pseudo-behaviour part. The weight is the joint
    ratio rho (1 - P) / ((1 - rho) P), P = E[p(x)]: it equals the pseudo weight w~ where p(x) is
    constant, and corrects for the parts' different contexts where it is not; expected rewards
    carry the same correction p (1 - P) / ((1 - p) P). notes: what a reader of the result must know.
    """

    rho: Array
    problem: Problem
    share: float
    weight_error: float
    notes: tuple[str, ...] = ()


def pseudo_problem(
    log: SelectionLog,
    *,
    share: float,
    importance_fit: str = "exact",
    network: NetworkOptions | None = None,
    seed: int = 0,
    min_draws: int = MIN_DRAWS,
) -> PseudoProblem:
    """Fit rho once and set up the pseudo problem (splits are then drawn from it cheaply)."""
    source = log.source
    if importance_fit not in ("exact", "network"):
        raise OfftowerError(f"unknown importance_fit {importance_fit!r}; use 'exact' or 'network'.")
    if importance_fit == "network" and not isinstance(source, DensePolicies):
        raise OfftowerError(
            "importance_fit='network' needs policies over all items (SelectionLog.from_policies); "
            "use importance_fit='exact' here."
        )
    if isinstance(source, DensePolicies):
        if importance_fit == "network":
            return _dense_network(log, source, share, network or NetworkOptions(), seed)
        return _dense_exact(log, source, share)
    if isinstance(source, BehaviorDraws):
        return _from_draws(log, source, share, min_draws)
    rho = fit_split_pooled(log.problem.weight, share)
    notes = [
        "only logged propensities are known: one multiplier is pooled over contexts, the share p(x)"
        " varies with the context"
    ]
    return _finish(log, rho, {}, None, share, notes)


def _dense_exact(log: SelectionLog, source: DensePolicies, share: float) -> PseudoProblem:
    n, n_items = source.behavior.shape
    rho = np.empty(n)
    p = np.empty(n)
    expected = {name: np.empty(n) for name in source.predictions}
    step = max(1, _CHUNK_ELEMENTS // n_items)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        behavior = source.behavior[part]
        weight = importance_weights(behavior, source.target[part])
        full = solve_multiplier(weight, behavior, share).apply(weight)
        _collect(rho, p, expected, part, full, behavior, source)
    return _finish(log, rho, expected, p, share, [])


def _dense_network(
    log: SelectionLog, source: DensePolicies, share: float, options: NetworkOptions, seed: int
) -> PseudoProblem:
    if source.context is None:
        raise OfftowerError(
            "importance_fit='network' needs the contexts: SelectionLog.from_policies(context=...)."
        )
    fit: NetworkFit = fit_network(
        source.behavior,
        source.target,
        source.action,
        source.context,
        source.item_features,
        share=share,
        options=options,
        seed=seed,
    )
    n = log.problem.n
    rho, p = np.empty(n), np.empty(n)
    expected = {name: np.empty(n) for name in source.predictions}
    _collect(rho, p, expected, slice(0, n), fit.rho, source.behavior, source)
    notes = [f"network fit: lambda = {fit.chosen:g}, mean p(x) = {p.mean():.3f}"]
    if not fit.qualified:
        notes.append(
            f"no lambda kept the mean share within {options.tolerance:g} of {share:g}; the nearest "
            "was taken"
        )
    return _finish(log, rho, expected, p, share, notes)


def _collect(
    rho: Array,
    p: Array,
    expected: dict[str, Array],
    part: slice,
    full: Array,
    behavior: Array,
    source: DensePolicies,
) -> None:
    """Reduce rho (rows, A) of one chunk to what the rows need."""
    mass = behavior * full
    rho[part] = full[np.arange(full.shape[0]), source.action[part]]
    p[part] = mass.sum(axis=1)
    for name, prediction in source.predictions.items():
        expected[name][part] = np.einsum("ij,ij->i", mass, prediction[part]) / p[part]


def _from_draws(
    log: SelectionLog, source: BehaviorDraws, share: float, min_draws: int
) -> PseudoProblem:
    n, draws = source.weight.shape
    rho, p = np.empty(n), np.empty(n)
    expected = {name: np.empty(n) for name in source.predictions}
    step = max(1, _CHUNK_ELEMENTS // max(draws, 1))
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        rho[part], drawn = fit_split_draws(
            log.problem.weight[part], source.weight[part], share, min_draws=min_draws
        )
        p[part] = drawn.mean(axis=1)
        for name, prediction in source.predictions.items():
            expected[name][part] = (drawn * prediction[part]).mean(axis=1) / p[part]
    return _finish(log, rho, expected, p, share, [f"rho fitted on {draws} draws per context"])


def _finish(
    log: SelectionLog,
    rho: Array,
    expected: dict[str, Array],
    p: Array | None,
    share: float,
    notes: list[str],
) -> PseudoProblem:
    # p(x) averages over items as well, so its mean is the less noisy estimate of P = E[rho]
    overall = float(rho.mean() if p is None else p.mean())
    odds = (1.0 - overall) / overall
    weight = rho / (1.0 - rho) * odds
    models: dict[str, ModelPredictions] = {}
    if p is not None:
        context_weight = p / (1.0 - p) * odds
        pseudo = weight / context_weight
        for name, value in expected.items():
            models[name] = ModelPredictions(
                log.problem.models[name].action_reward, value * context_weight
            )
    else:
        pseudo = weight
    error = float(np.mean((pseudo - log.problem.weight) ** 2))
    return PseudoProblem(
        rho, Problem(weight, log.problem.reward, models), share, error, tuple(notes)
    )
