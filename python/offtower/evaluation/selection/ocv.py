"""Cross-validated off-policy evaluation (Cief, Kveton, Kompan, AAAI 2025, algorithm 1).

Weak where a bias is smaller than the validator's own noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.selection.log import SelectionLog
from offtower.evaluation.selection.problem import Candidate
from offtower.evaluation.selection.result import SelectionResult, make_result


def select_ocv(
    log: SelectionLog,
    candidates: Sequence[Candidate],
    *,
    repetitions: int = 10,
    seed: int = 0,
) -> SelectionResult:
    """Rank candidates by their squared distance on one part to a validator's value on the other.

    The validator is the consistent candidate of least variance. Candidates are ranked by mean plus
    standard error of the loss, the paper's rule.
    The training part's share is var(candidate) / (var(candidate) + var(validator)), the paper's
    choice; both variances come from per-row contributions. Raises OfftowerError when no candidate
    can validate.
    """
    ranked = list(candidates)
    values, influence = log.problem.influence(ranked)
    n = log.problem.n
    variance = np.mean(influence**2, axis=1) / n
    able = [j for j, c in enumerate(ranked) if c.is_consistent]
    if not able:
        raise OfftowerError(
            "OCV needs a validator without bias: add IPS, SNIPS, DR or SNDR to the candidates."
        )
    least = min(able, key=lambda j: variance[j])
    validator, validator_variance = ranked[least], variance[least]
    rng = np.random.default_rng([seed, 0x0CF])
    losses = np.empty((repetitions, len(ranked)))
    for j, candidate in enumerate(ranked):
        total = variance[j] + validator_variance
        share = variance[j] / total if total > 0.0 else 0.5
        size = int(np.clip(round(n * share), 1, n - 1))
        for repetition in range(repetitions):
            order = rng.permutation(n)
            estimate = log.problem.values([candidate], order[:size])[0]
            truth = log.problem.values([validator], order[size:])[0]
            losses[repetition, j] = (estimate - truth) ** 2
    mse = losses.mean(axis=0)
    noise = losses.std(axis=0, ddof=1) / np.sqrt(repetitions)
    order_ = [int(j) for j in np.argsort(mse + noise, kind="stable")]
    # splits are drawn per candidate, so the differences are not paired
    margin_noise = np.hypot(noise, noise[order_[0]])
    margin_noise[order_[0]] = 0.0
    return make_result(
        "ocv",
        ranked,
        values,
        mse,
        noise,
        margin_noise,
        order=order_,
        details={"validator": validator.name, "repetitions": repetitions},
        notes=("its mse contains the validator's variance and that of a smaller sample",),
    )
