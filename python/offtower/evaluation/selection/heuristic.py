"""The non-adaptive heuristic: each behavior policy is the pseudo target once.

Saito et al., Evaluating the Robustness of Off-Policy Evaluation, RecSys 2021. It ignores the target
policy, so it is weak where the target differs from all behavior policies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.rows import ModelPredictions
from offtower.evaluation.selection.log import SelectionLog
from offtower.evaluation.selection.problem import Candidate, Problem
from offtower.evaluation.selection.result import SelectionResult, make_result


def select_heuristic(
    log: SelectionLog,
    candidates: Sequence[Candidate],
    *,
    repetitions: int = 10,
    seed: int = 0,
) -> SelectionResult:
    """Rank candidates by their error in estimating one behavior policy from the others' rows.

    Each of the P policies is the pseudo target in turn and the mixture of the others, by their
    share of rows, the behavior policy; `repetitions` bootstraps of the others' rows each. The
    proxy truth's variance is subtracted. Raises OfftowerError unless the log names two or more
    policies.
    """
    policies = log.policies
    if policies is None or policies.probability.shape[1] < 2:
        raise OfftowerError(
            "the heuristic needs a log of two or more behavior policies: give row_policy and "
            "policies to SelectionLog.from_policies, or use method='pasif'."
        )
    count = policies.probability.shape[1]
    sizes = np.bincount(policies.row_policy, minlength=count).astype(np.float64)
    if np.any(sizes < 2):
        raise OfftowerError(f"every behavior policy needs rows; rows per policy: {sizes.tolist()}.")
    ranked = [c for c in candidates if c.model is None or c.model in policies.expected_reward]
    skipped = {
        c.name: "no expected rewards of the reward model under each behavior policy"
        for c in candidates
        if c not in ranked
    }
    rng = np.random.default_rng([seed, 0x4E02])
    errors = []
    for target in range(count):
        others = sizes.copy()
        others[target] = 0.0
        behavior = policies.probability @ (others / others.sum())
        rows = np.flatnonzero((policies.row_policy != target) & (behavior > 0.0))
        own = log.problem.reward[policies.row_policy == target]
        weight = policies.probability[rows, target] / behavior[rows]
        models = {
            name: ModelPredictions(
                log.problem.models[name].action_reward[rows], expected[rows, target]
            )
            for name, expected in policies.expected_reward.items()
        }
        problem = Problem(weight, log.problem.reward[rows], models)
        truth, truth_variance = own.mean(), own.var(ddof=1) / own.size
        for _ in range(repetitions):
            values = problem.values(ranked, rng.choice(rows.size, rows.size))
            errors.append((values - truth) ** 2 - truth_variance)
    table = np.array(errors)
    mse = table.mean(axis=0)
    root = np.sqrt(table.shape[0])
    paired = table - table[:, [int(np.argmin(mse))]]
    return make_result(
        "heuristic",
        ranked,
        log.problem.values(ranked),
        mse,
        table.std(axis=0, ddof=1) / root,
        paired.std(axis=0, ddof=1) / root,
        skipped=skipped,
        details={"policies": count, "repetitions": repetitions},
        notes=("the ranking does not depend on the target policy",),
    )
