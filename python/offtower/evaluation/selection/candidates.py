"""Default candidates, their parameters chosen by SLOPE."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from offtower.evaluation import estimators as e
from offtower.evaluation.estimators.tuning import slope_choice, threshold_grid
from offtower.evaluation.intervals.statistics import Estimate
from offtower.evaluation.rows import Array
from offtower.evaluation.selection.problem import Candidate, Problem

Maker = Callable[[float], Any]


def default_candidates(problem: Problem, models: Iterable[str] | None = None) -> list[Candidate]:
    """Model-free estimators, and the others with each reward model.

    IPS, SNIPS, clipped, sub-Gaussian and logarithmically smoothed IPS (the last only where no
    reward is negative); per model DM, DR, SNDR, Switch-DR, DRos, clipped and sub-Gaussian DR,
    named like "DR[trees]".
    Of slates these are the cascade forms, without DM; IPS, SNIPS and DR with the weights of whole
    slates are added as "IPS (standard)", and are the consistent ones.
    problem: the log's rows (`SelectionLog.problem`), on which SLOPE chooses the parameters.
    models: names of reward models, all of the problem's by default.
    """
    names = list(problem.models if models is None else models)
    clip = threshold_grid(problem.weight)
    smooth = np.concatenate([[1e-4], np.geomspace(1e-3, 1.0, 7)])
    top = max(float(problem.weight.max()), 1e-12) ** 2
    shrink = top * np.geomspace(1e3, 1e-3, 10)
    slates = problem.slates
    if slates is not None and slates.earlier_weight is None:
        names = []  # Without conditional propensities a doubly robust estimator has no weights.
    out = [Candidate("IPS", e.IPS()), Candidate("SNIPS", e.SNIPS())]
    free: list[tuple[str, Maker, Array]] = [
        ("ClippedIPS", lambda v: e.ClippedIPS(max_weight=v), clip),
        ("SubGaussianIPS", lambda v: e.SubGaussianIPS(lambda_=v), smooth),
    ]
    if problem.reward.min() >= 0.0:
        free.append(("LogSmoothing", lambda v: e.LogSmoothing(lambda_=v), smooth))
    out += [_tuned(problem, name, make, grid, None) for name, make, grid in free]
    for model in names:
        out += [
            Candidate(f"{kind.__name__}[{model}]", kind(), model)
            for kind in (e.DM, e.DR, e.SNDR)
            if slates is None or kind is not e.DM
        ]
        based: list[tuple[str, Maker, Array]] = [
            ("SwitchDR", lambda v: e.SwitchDR(threshold=v), clip),
            ("DRos", lambda v: e.DRos(shrinkage=v), shrink),
            ("ClippedDR", lambda v: e.ClippedDR(max_weight=v), clip),
            ("SubGaussianDR", lambda v: e.SubGaussianDR(lambda_=v), smooth),
        ]
        out += [
            _tuned(problem, f"{name}[{model}]", make, grid, model) for name, make, grid in based
        ]
    if slates is None or slates.earlier_weight is None:
        return out
    cascade = [
        replace(one, consistent=False, assumes=True) if one.is_consistent else one for one in out
    ]
    standard = [
        Candidate(f"{one.name} (standard)", e.Standard(one.estimator), one.model)
        for one in out
        if one.is_consistent
    ]
    return cascade + standard


def _tuned(problem: Problem, name: str, make: Maker, grid: Array, model: str | None) -> Candidate:
    """SLOPE along a grid from least to most bias: the last value that all before it allow."""
    ladder = [Candidate(name, make(float(value)), model) for value in grid]
    values, influence = problem.influence(ladder)
    error = np.sqrt(np.mean(influence**2, axis=1) / problem.n)
    steps = [Estimate(float(v), float(s), problem.n) for v, s in zip(values, error, strict=True)]
    return ladder[slope_choice(steps)]
