"""Ties: what a selector cannot tell apart, variance or paired differences may."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.selection.log import SelectionLog
from offtower.evaluation.selection.paired import select_paired
from offtower.evaluation.selection.problem import Array, Candidate

TIE_RULES = ("none", "variance", "paired")


def resolve_ties(
    log: SelectionLog,
    candidates: Sequence[Candidate],
    mse: Array,
    margin_noise: Array,
    rule: str,
    *,
    width: float = 2.0,
) -> list[int]:
    """A ranking: those within `width` standard errors of the least mse by `rule`, then the rest.

    mse, margin_noise: (c,) a selector's scores and the noise of each one's distance to the least.
    rule: "none" leaves the order of mse; "variance" takes the least variance on the whole log,
    which lets in every biased candidate that the selector failed to exclude; "paired" takes the
    order of `select_paired`, or that of mse where no candidate is consistent.
    """
    if rule not in TIE_RULES:
        raise OfftowerError(f"unknown rule for ties {rule!r}; use one of {', '.join(TIE_RULES)}.")
    by_mse = [int(j) for j in np.argsort(mse, kind="stable")]
    if rule == "none" or (rule == "paired" and not any(c.is_consistent for c in candidates)):
        return by_mse
    tied = mse - mse.min() <= width * margin_noise
    tied[by_mse[0]] = True
    if rule == "variance":
        _, influence = log.problem.influence(candidates)
        key = np.mean(influence**2, axis=1)
    else:
        result = select_paired(log, candidates)
        key = np.array([result.position(c.name) for c in candidates], dtype=np.float64)
    inside = sorted((j for j in by_mse if tied[j]), key=lambda j: key[j])
    return inside + [j for j in by_mse if not tied[j]]
