"""SLOPE over the whole list of candidates (Su, Srinath, Krishnamurthy, ICML 2020).

Weak where a bias lies within the intervals, and where order by variance is not order by bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offtower.evaluation.selection.log import SelectionLog
from offtower.evaluation.selection.problem import Candidate
from offtower.evaluation.selection.result import SelectionResult, make_result


def select_slope(
    log: SelectionLog,
    candidates: Sequence[Candidate],
    *,
    width: float = 2.0,
) -> SelectionResult:
    """Choose the candidate of least variance that agrees with every one of larger variance.

    Candidates are put in order of decreasing variance (the theory wants their bias to increase
    along it; between families of estimators nothing promises that). With c_i = width * standard
    error, the choice is the last i with |V_i - V_j| <= c_i + (sqrt(6) - 1) c_j for all j before it
    (their theorem 2 and its remark). `mse` is variance plus the square of the bias that a violated
    inequality proves; the ranking is the choice first, then increasing `mse`. No noise is
    estimated.
    """
    ranked = list(candidates)
    values, influence = log.problem.influence(ranked)
    n = log.problem.n
    variance = np.mean(influence**2, axis=1) / n
    ladder = np.argsort(-variance, kind="stable")
    half = width * np.sqrt(variance)
    slack = np.sqrt(6.0) - 1.0
    proven = np.zeros(len(ranked))
    chosen, open_ = int(ladder[0]), True
    for place, i in enumerate(ladder):
        before = ladder[:place]
        if before.size:
            gap = np.abs(values[i] - values[before]) - half[i] - slack * half[before]
            proven[i] = max(0.0, float(gap.max()))
        open_ = open_ and proven[i] == 0.0
        if open_:
            chosen = int(i)
    mse = variance + proven**2
    rest = [int(j) for j in np.argsort(mse, kind="stable") if j != chosen]
    unknown = np.full(len(ranked), np.nan)
    return make_result(
        "slope",
        ranked,
        values,
        mse,
        unknown,
        unknown,
        order=[chosen, *rest],
        details={"width": width, "ladder": [ranked[int(i)].name for i in ladder]},
    )
