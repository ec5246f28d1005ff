"""PAS-IF: rank estimators on a split of the log that imitates the target policy.

Udagawa, Kiyohara, Narita, Saito, Tateno: Policy-Adaptive Estimator Selection for Off-Policy
Evaluation, AAAI 2023, algorithm 1. Differences to the published code: rho is fitted once, a row is
never on both sides of a split, the proxy truth's own variance is subtracted, and where p(x) varies
the parts' different contexts are weighted for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.selection.log import SelectionLog
from offtower.evaluation.selection.network import NetworkOptions
from offtower.evaluation.selection.problem import Array, Candidate
from offtower.evaluation.selection.pseudo import pseudo_problem
from offtower.evaluation.selection.result import SelectionResult, make_result
from offtower.evaluation.selection.splits import MIN_DRAWS, check_share
from offtower.evaluation.selection.ties import resolve_ties

DEFAULT_REPETITIONS = 100


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
    bootstrap does (it adds noise: redrawing the split is enough). ties: how candidates within two
    standard errors of the best are ordered, "paired", "variance" or "none", the published ranking
    (see `resolve_ties`).
    A candidate's `mse` is that of the pseudo problem, with (1 - share) n rows; `noise` is over
    splits of this one log, and does not contain the log's own noise.
    """
    check_share(share)
    if repetitions < 2:
        raise OfftowerError(f"PAS-IF needs at least 2 repetitions, got {repetitions}.")
    pseudo = pseudo_problem(
        log,
        share=share,
        importance_fit=importance_fit,
        network=network,
        seed=seed,
        min_draws=min_draws,
    )
    judged = [c for c in candidates if c.model is None or c.model in pseudo.problem.models]
    skipped = {
        c.name: "its pseudo expected reward needs the behaviour policy over items, or draws from it"
        for c in candidates
        if c not in judged
    }
    if not judged:
        raise OfftowerError(
            "PAS-IF can judge none of the candidates: " + next(iter(skipped.values()))
        )
    errors = _repetition_errors(pseudo.rho, pseudo.problem, judged, repetitions, resample, seed)
    mse = errors.mean(axis=0)
    root = np.sqrt(repetitions)
    noise = errors.std(axis=0, ddof=1) / root
    best = int(np.argmin(mse))
    margin_noise = (errors - errors[:, [best]]).std(axis=0, ddof=1) / root
    values = log.problem.values(judged)
    order = resolve_ties(log, judged, mse, margin_noise, ties)
    margin_noise = (errors - errors[:, [order[0]]]).std(axis=0, ddof=1) / root
    details: dict[str, Any] = {
        "importance_fit": importance_fit,
        "share": share,
        "repetitions": repetitions,
        "resample": resample,
        "ties": ties,
        "mean_share": float(pseudo.rho.mean()),
        "weight_error": pseudo.weight_error,
    }
    return make_result(
        "pasif",
        judged,
        values,
        mse,
        noise,
        margin_noise,
        order=order,
        skipped=skipped,
        details=details,
        notes=pseudo.notes,
    )


def _repetition_errors(
    rho: Array,
    problem: Any,
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


def _draw_split(rho: Array, rng: np.random.Generator) -> Any:
    """One side per row, each side with at least two rows."""
    for _ in range(100):
        side = rng.random(rho.shape[0]) < rho
        if 2 <= side.sum() <= rho.shape[0] - 2:
            return side
    raise OfftowerError(
        f"a log of {rho.shape[0]} rows cannot be split with a mean share of {rho.mean():.3g}: one "
        "part stays empty. Use more rows or a larger share."
    )
