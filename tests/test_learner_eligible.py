"""The learner with eligible actions: as a mask of a dict, and as a section of a schema."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from offtower import TwoTowerPolicyLearner
from offtower.errors import DataError
from tests.training.eligible_data import N, items, log, schemas

ACTIONS = 6


def feedback(n: int, seed: int) -> dict[str, Any]:
    """Shown evenly among eligible actions; action 5 is eligible in few rounds and the best."""
    rng = np.random.default_rng(seed)
    eligible = rng.random((n, ACTIONS)) < np.array([0.9, 0.9, 0.9, 0.5, 0.5, 0.2])
    eligible[:, 0] = True
    action = np.array([rng.choice(np.flatnonzero(row)) for row in eligible])
    mean = np.array([0.1, 0.3, 0.5, 0.2, 0.4, 0.9])
    return {
        "context": rng.standard_normal((n, 3)),
        "action": action,
        "reward": (rng.random(n) < mean[action]).astype(float),
        "pscore": 1.0 / eligible.sum(axis=1),
        "action_context": np.eye(ACTIONS),
        "eligible": eligible,
    }


def test_a_mask_restricts_learning_prediction_and_evaluation() -> None:
    train, test = feedback(1500, 0), feedback(400, 1)
    learner = TwoTowerPolicyLearner(
        3, ACTIONS, objective="ips", epochs=8, batch_size=100, learning_rate=0.02,
        embedding_dim=4, hidden_layer_sizes=(8,),
    ).fit(train)  # fmt: skip
    context, mask = test["context"], test["eligible"]
    p = learner.predict_proba(context, test["action_context"], eligible=mask)[:, :, 0]
    assert (p[~mask] == 0.0).all() and (p[mask] > 0.0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1.0)
    plain = learner.predict_proba(context, test["action_context"])[:, :, 0]
    wanted = np.where(mask, plain, 0.0)
    np.testing.assert_allclose(p, wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-6)
    action = test["action"]
    found = learner.log_prob(context, action, test["action_context"], eligible=mask)
    np.testing.assert_allclose(found, np.log(p[np.arange(400), action]), rtol=1e-5, atol=1e-5)
    best = learner.predict(context, test["action_context"], eligible=mask)
    assert mask[np.arange(400), best].all()
    assert (best[mask[:, 5]] == 5).mean() > 0.9  # The best action, though it is rarely eligible.
    result = learner.evaluate(test)
    weight = p[np.arange(400), action] / test["pscore"]
    ips = result.policies["learner"].estimates["ips"].estimate.value
    assert ips == pytest.approx(float((weight * test["reward"]).mean()), rel=1e-5)


def test_a_schema_restricts_predictions_by_the_columns() -> None:
    table, sets = log(200, ("attribute", "exclude"))
    log_schema, catalogue_schema = schemas("attribute", "exclude")
    learner = TwoTowerPolicyLearner(
        schema=log_schema, catalogue_schema=catalogue_schema, objective="ips", epochs=1
    )
    learner.fit(table, action_context=items())
    p = learner.predict_proba(table)[:, :, 0]
    assert p.shape == (len(sets), N)
    np.testing.assert_array_equal(p > 0.0, sets)
    action = table.column("action").to_numpy().copy()
    found = learner.log_prob(table, action)
    np.testing.assert_allclose(found, np.log(p[np.arange(len(sets)), action]), atol=1e-5)


def test_a_wrong_mask_is_refused() -> None:
    train = feedback(60, 2)
    learner = TwoTowerPolicyLearner(3, ACTIONS, objective="ips", epochs=1)
    for mask, said in (
        (train["eligible"][:-1], r"shape \(60, n_actions\)"),
        (train["eligible"].astype(int), "true or false"),
        (np.zeros((60, ACTIONS), dtype=bool), "row 0 of 'eligible' has no eligible action"),
    ):
        with pytest.raises(DataError, match=said):
            learner.fit({**train, "eligible": mask})
