"""PAS-IF: rank estimators on a split of the log that imitates the target policy.

Udagawa, Kiyohara, Narita, Saito, Tateno: Policy-Adaptive Estimator Selection for Off-Policy
Evaluation, AAAI 2023, algorithm 1. Differences to the published code: rho is fitted once, a row is
never on both sides of a split, the proxy truth's own variance is subtracted, and where p(x) varies
the parts' different contexts are weighted for. Weak where the log is short: the pseudo problem has
fewer rows than the log, and the picks are noisy unless the split is drawn often.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offtower.errors import OfftowerError
from offtower.evaluation.rows import Array
from offtower.evaluation.selection.log import SelectionLog
from offtower.evaluation.selection.network import NetworkOptions
from offtower.evaluation.selection.paired import select_paired
from offtower.evaluation.selection.problem import Candidate, Problem
from offtower.evaluation.selection.pseudo import pseudo_problem
from offtower.evaluation.selection.result import SelectionResult, make_result
from offtower.evaluation.selection.splits import MIN_DRAWS, check_share

DEFAULT_REPETITIONS = 100
TIE_RULES = ("none", "paired")
_TIE_WIDTH = 2.0
"""Standard errors within which candidates are tied."""


def select_pasif(
    log: SelectionLog,
    candidates: Sequence[Candidate],
    *,
    importance_fit: str = "exact",
    share: float = 0.2,
    repetitions: int = DEFAULT_REPETITIONS,
    resample: bool = False,
    ties: str = "paired",
    network: NetworkOptions | None = None,
    min_draws: int = MIN_DRAWS,
    seed: int = 0,
) -> SelectionResult:
    """Rank candidates by their mean squared error on pseudo problems drawn from the log.

    importance_fit: "exact" or "network". share: k. repetitions: splits that are drawn.
    resample: also draw each part's rows with replacement, after the split, as the published
    bootstrap does (it adds noise: redrawing the split is enough). ties: order candidates within two
    standard errors of the best by `select_paired` ("paired"; by mse where none is consistent), or
    leave the published ranking ("none").
    A candidate's `mse` is that of the pseudo problem, with (1 - share) n rows; `noise` is over
    splits of this one log, and does not contain the log's own noise.
    """
    check_share(share)
    if repetitions < 2:
        raise OfftowerError(f"PAS-IF needs at least 2 repetitions, got {repetitions}.")
    if ties not in TIE_RULES:
        raise OfftowerError(f"unknown rule for ties {ties!r}; use one of {', '.join(TIE_RULES)}.")
    pseudo = pseudo_problem(
        log,
        share=share,
        importance_fit=importance_fit,
        network=network,
        seed=seed,
        min_draws=min_draws,
    )
    ranked = [c for c in candidates if c.model is None or c.model in pseudo.problem.models]
    skipped = {
        c.name: "its pseudo expected reward needs the behavior policy over items, or draws from it"
        for c in candidates
        if c not in ranked
    }
    if not ranked:
        raise OfftowerError(
            "PAS-IF can rank none of the candidates: " + next(iter(skipped.values()))
        )
    errors = _repetition_errors(pseudo.rho, pseudo.problem, ranked, repetitions, resample, seed)
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
        skipped=skipped,
        details={
            "importance_fit": importance_fit,
            "share": share,
            "repetitions": repetitions,
            "resample": resample,
            "ties": ties,
            "mean_share": float(pseudo.rho.mean()),
            "weight_error": pseudo.weight_error,
        },
        notes=pseudo.notes,
    )


def _repetition_errors(
    rho: Array,
    problem: Problem,
    candidates: list[Candidate],
    repetitions: int,
    resample: bool,
    seed: int,
) -> Array:
    """(repetitions, candidates) squared errors less the proxy truth's variance."""
    rng = np.random.default_rng([seed, 0x9A51F])
    out = np.empty((repetitions, len(candidates)))
    for repetition in range(repetitions):
        to_target = _draw_split(rho, rng)
        target = np.flatnonzero(to_target)
        rest = np.flatnonzero(~to_target)
        if resample:
            target = rng.choice(target, target.size)
            rest = rng.choice(rest, rest.size)
        reward = problem.reward[target]
        truth_variance = reward.var(ddof=1) / reward.size
        values = problem.values(candidates, rest)
        out[repetition] = (values - reward.mean()) ** 2 - truth_variance
    return out


def _draw_split(rho: Array, rng: np.random.Generator) -> NDArray[np.bool_]:
    """One side per row, each side with at least two rows."""
    for _ in range(100):
        side = rng.random(rho.shape[0]) < rho
        if 2 <= side.sum() <= rho.shape[0] - 2:
            return side
    raise OfftowerError(
        f"a log of {rho.shape[0]} rows cannot be split with a mean share of {rho.mean():.3g}: one "
        "part stays empty. Use more rows or a larger share."
    )
