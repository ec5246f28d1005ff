"""Values of OBP 0.4.1 on its own synthetic data, given the same predictions, to 1e-12."""

from __future__ import annotations

import numpy as np
import pytest
from obp.dataset import SyntheticBanditDataset, logistic_reward_function
from obp.ope import (
    DirectMethod,
    DoublyRobust,
    DoublyRobustWithShrinkage,
    InverseProbabilityWeighting,
    SelfNormalizedDoublyRobust,
    SelfNormalizedInverseProbabilityWeighting,
    SwitchDoublyRobust,
)

from offtower.evaluation import EvaluationRows
from offtower.evaluation import estimators as e

PAIRS = [
    (e.IPS(), InverseProbabilityWeighting()),
    (e.SNIPS(), SelfNormalizedInverseProbabilityWeighting()),
    (e.DM(), DirectMethod()),
    (e.DR(), DoublyRobust()),
    (e.SNDR(), SelfNormalizedDoublyRobust()),
    (e.SwitchDR(threshold=0.8), SwitchDoublyRobust(tau=0.8)),
    (e.SwitchDR(threshold=3.0), SwitchDoublyRobust(tau=3.0)),
    (e.DRos(shrinkage=0.5), DoublyRobustWithShrinkage(lambda_=0.5)),
    (e.DRos(shrinkage=50.0), DoublyRobustWithShrinkage(lambda_=50.0)),
    (e.DRos(shrinkage=0.0), DoublyRobustWithShrinkage(lambda_=0.0)),
]


@pytest.fixture(scope="module")
def problem() -> dict[str, np.ndarray]:
    data = SyntheticBanditDataset(
        n_actions=10,
        dim_context=5,
        reward_type="binary",
        reward_function=logistic_reward_function,
        random_state=12345,
    ).obtain_batch_bandit_feedback(n_rounds=5000)
    rng = np.random.default_rng(0)
    logits = 3.0 * data["expected_reward"] + rng.normal(size=(5000, 10))
    policy = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    # Rows of OBP's softmax add up to 1 only to rounding, and it divides by their sum.
    policy /= policy.sum(axis=1, keepdims=True)
    predictions = np.clip(data["expected_reward"] + 0.1 * rng.normal(size=(5000, 10)), 0.0, 1.0)
    return {
        "reward": data["reward"],
        "action": data["action"],
        "pscore": data["pscore"],
        "action_dist": policy[:, :, None],
        "estimated_rewards_by_reg_model": predictions[:, :, None],
    }


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda x: getattr(x, "name", ""))
def test_values_agree(ours: e.Estimator, theirs: object, problem: dict[str, np.ndarray]) -> None:
    n = np.arange(5000)
    policy = problem["action_dist"][:, :, 0]
    predictions = problem["estimated_rewards_by_reg_model"][:, :, 0]
    rows = EvaluationRows(
        policy[n, problem["action"]] / problem["pscore"],
        problem["reward"],
        predictions[n, problem["action"]],
        (policy * predictions).sum(axis=1),
    )
    expected = theirs.estimate_policy_value(**problem)  # type: ignore[attr-defined]
    assert ours.estimate(rows).value == pytest.approx(expected, rel=1e-12, abs=1e-12)
