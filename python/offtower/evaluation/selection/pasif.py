"""PAS-IF: rank estimators on a split of the log that imitates the target policy.

Udagawa, Kiyohara, Narita, Saito, Tateno: Policy-Adaptive Estimator Selection for Off-Policy
Evaluation, AAAI 2023, algorithm 1. Sending row (x, a) to the pseudo-target part with probability
rho(x, a) makes that part a log of pi_b rho / p(x), and the rest one of pi_b (1 - rho) / (1 - p(x)),
p(x) = E_{pi_b}[rho | x]; rho is fitted so that the ratio of the two imitates pi_e / pi_b.
Differences to the published code: rho is fitted once, a row is never on both sides of a split, the
proxy truth's own variance is subtracted, and where p(x) varies the parts' different contexts are
weighted for. Weak where the log is short: the pseudo problem has fewer rows than the log, and the
picks are noisy unless the split is drawn often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.errors import OfftowerError
from offtower.evaluation.rows import Array, ModelPredictions
from offtower.evaluation.samples import joined
from offtower.evaluation.selection.exact import fit_draws, fit_pooled, solve_multiplier
from offtower.evaluation.selection.log import (
    BehaviorDraws,
    DensePolicies,
    SelectionLog,
    importance_weights,
)
from offtower.evaluation.selection.network import NetworkOptions, fit_network
from offtower.evaluation.selection.paired import select_paired
from offtower.evaluation.selection.problem import Candidate, Problem
from offtower.evaluation.selection.result import SelectionResult, make_result

TIE_RULES = ("none", "paired")
_TIE_WIDTH = 2.0
"""Standard errors within which candidates are tied."""
_CHUNK_ELEMENTS = 1 << 20


def select_pasif(
    log: SelectionLog,
    candidates: Sequence[Candidate],
    *,
    share: float = 0.2,
    repetitions: int = 100,
    ties: str = "paired",
    network: NetworkOptions | None = None,
    seed: int = 0,
) -> SelectionResult:
    """Rank candidates by their mean squared error on pseudo problems drawn from the log.

    share: k, the expected share of the pseudo-target part. repetitions: splits that are drawn.
    ties: order candidates within two standard errors of the best by `select_paired` ("paired"; by
    mse where none is consistent), or leave the published ranking ("none"). network: fit rho by the
    published network, in place of the exact fit.
    A candidate's `mse` is that of the pseudo problem, with (1 - share) n rows; `noise` is over
    splits of this one log, and does not contain the log's own noise.
    """
    if repetitions < 2:
        raise OfftowerError(f"PAS-IF needs at least 2 repetitions, got {repetitions}.")
    if ties not in TIE_RULES:
        raise OfftowerError(f"unknown rule for ties {ties!r}; use one of {', '.join(TIE_RULES)}.")
    pseudo = pseudo_problem(log, share, network, seed)
    ranked = [c for c in candidates if c.model is None or c.model in pseudo.problem.models]
    reason = "its pseudo expected reward needs the behavior policy over items, or draws from it"
    if not ranked:
        raise OfftowerError(f"PAS-IF can rank none of the candidates: {reason}")
    errors = _squared_errors(pseudo, ranked, repetitions, seed)
    mse = errors.mean(axis=0)
    root = np.sqrt(repetitions)

    def margin_noise(reference: int) -> Array:
        distance = errors - errors[:, [reference]]
        return np.asarray(distance.std(axis=0, ddof=1) / root)

    order = [int(j) for j in np.argsort(mse, kind="stable")]
    if ties == "paired" and any(c.is_consistent for c in ranked):
        tied = mse - mse.min() <= _TIE_WIDTH * margin_noise(int(np.argmin(mse)))
        tied[order[0]] = True
        paired = select_paired(log, ranked)
        inside = [j for j in order if tied[j]]
        inside.sort(key=lambda j: paired.position(ranked[j].name))
        order = inside + [j for j in order if not tied[j]]
    return make_result(
        "pasif",
        ranked,
        log.problem.values(ranked),
        mse,
        errors.std(axis=0, ddof=1) / root,
        margin_noise(order[0]),
        order=order,
        skipped={c.name: reason for c in candidates if c not in ranked},
        details={
            "importance_fit": "exact" if network is None else "network",
            "share": share,
            "repetitions": repetitions,
            "ties": ties,
            "mean_share": float(pseudo.rho.mean()),
            "weight_error": pseudo.weight_error,
        },
        notes=pseudo.notes,
    )


def _squared_errors(
    pseudo: PseudoProblem, candidates: list[Candidate], repetitions: int, seed: int
) -> Array:
    """(repetitions, candidates) squared errors less the proxy truth's variance."""
    rng = np.random.default_rng([seed, 0x9A51F])
    out = np.empty((repetitions, len(candidates)))
    for repetition in range(repetitions):
        target = _draw_split(pseudo.rho, rng)
        reward = pseudo.problem.reward[np.flatnonzero(target)]
        values = pseudo.problem.values(candidates, np.flatnonzero(~target))
        out[repetition] = (values - reward.mean()) ** 2 - reward.var(ddof=1) / reward.size
    return out


def _draw_split(rho: Array, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Whether each row is in the pseudo-target part; each part has at least two rows."""
    for _ in range(100):
        side = rng.random(rho.shape[0]) < rho
        if 2 <= side.sum() <= rho.shape[0] - 2:
            return side
    raise OfftowerError(
        f"a log of {rho.shape[0]} rows cannot be split with a mean share of {rho.mean():.3g}: one "
        "part stays empty. Use more rows or a larger share."
    )


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
    weight_error: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Split:
    """rho of the logged items, p(x), and by model the mean prediction on the pseudo target."""

    rho: Array
    p: Array
    expected: dict[str, Array]


def pseudo_problem(
    log: SelectionLog, share: float, network: NetworkOptions | None = None, seed: int = 0
) -> PseudoProblem:
    """Fit rho once and set up the pseudo problem, from which splits are drawn."""
    source = log.source
    if not 0.0 < share < 1.0:
        raise OfftowerError(f"share is {share}, expected a number strictly between 0 and 1.")
    if network is not None:
        if not isinstance(source, DensePolicies):
            raise OfftowerError(
                "importance_fit='network' needs policies over all items "
                "(SelectionLog.from_policies); use importance_fit='exact' here."
            )
        fit = fit_network(source, share, network, seed)
        split = _reduced(source, slice(None), fit.rho)
        note = f"network fit: lambda = {fit.chosen:g}, mean p(x) = {split.p.mean():.3f}"
        if not fit.qualified:
            note += f"; no lambda kept it within {network.tolerance:g} of the share {share:g}"
        return _posed(log, split, note)
    if source is None:
        rho = fit_pooled(log.problem.weight, share)
        note = (
            "only logged propensities are known: one multiplier is pooled over contexts, the share"
            " p(x) varies with the context"
        )
        return _posed(log, _Split(rho, np.array([rho.mean()]), {}), note)
    if isinstance(source, DensePolicies):
        parts = _chunks(*source.behavior.shape)
        return _posed(log, joined([_dense_split(source, part, share) for part in parts]))
    n, draws = source.weight.shape
    drawn = [_draws_split(log, source, part, share) for part in _chunks(n, draws)]
    return _posed(log, joined(drawn), f"rho fitted on {draws} draws per context")


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


def _draws_split(log: SelectionLog, source: BehaviorDraws, part: slice, share: float) -> _Split:
    rho, drawn = fit_draws(log.problem.weight[part], source.weight[part], share)
    p = drawn.mean(axis=1)
    expected = {
        name: (drawn * prediction[part]).mean(axis=1) / p
        for name, prediction in source.predictions.items()
    }
    return _Split(rho, p, expected)


def _posed(log: SelectionLog, split: _Split, *notes: str) -> PseudoProblem:
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
    return PseudoProblem(split.rho, Problem(weight, log.problem.reward, models), error, notes)
