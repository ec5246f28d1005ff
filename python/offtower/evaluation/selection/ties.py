"""Ties resolved by variance: what a selector cannot tell apart, the whole log's variance can."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offtower.evaluation.selection.problem import Array, Candidate, Problem


def resolve_ties(
    problem: Problem,
    candidates: Sequence[Candidate],
    mse: Array,
    margin_noise: Array,
    *,
    width: float = 2.0,
) -> list[int]:
    """A ranking: those within `width` standard errors of the least mse by variance, then the rest.

    mse, margin_noise: (c,) a selector's scores and the noise of each one's distance to the least.
    """
    _, influence = problem.influence(candidates)
    variance = np.mean(influence**2, axis=1) / problem.n
    tied = mse - mse.min() <= width * margin_noise
    tied[int(np.argmin(mse))] = True
    inside = [int(j) for j in np.argsort(variance, kind="stable") if tied[j]]
    outside = [int(j) for j in np.argsort(mse, kind="stable") if not tied[j]]
    return inside + outside
