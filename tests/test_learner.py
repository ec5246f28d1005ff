"""The facade: shapes, agreement of its parts, and that it learns without an oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from offtower import TwoTowerPolicyLearner
from offtower.data.simulate import ObpWorld
from offtower.errors import ConfigError, DataError, OfftowerError
from offtower.objectives import OBJECTIVES

WORLD = ObpWorld(8, 4, 3, beta=1.0, seed=142)
TRAIN, VALIDATION, TEST = (WORLD.sample(n, s) for s, n in enumerate((1500, 800, 3000), 1))


def needed(feedback: dict[str, Any]) -> dict[str, Any]:
    """What a real log has: neither the behavior policy nor the truth."""
    return {k: feedback[k] for k in ("context", "action", "reward", "pscore", "action_context")}


def learner(**options: Any) -> TwoTowerPolicyLearner:
    return TwoTowerPolicyLearner(4, 3, **{"epochs": 4, "hidden_layer_sizes": (16,), **options})


def value(fitted: TwoTowerPolicyLearner) -> float:
    pi = fitted.predict_proba(TEST["context"], TEST["action_context"])[:, :, 0]
    return float((pi * TEST["expected_reward"]).sum(1).mean())


def test_probabilities_are_those_of_the_served_policy() -> None:
    serving = {"temperature": 2.0, "uniform": 0.25}
    plain = learner(objective="ips").fit(TRAIN)
    served = learner(objective="ips", serving=serving).fit(TRAIN)
    x, a = TEST["context"], TEST["action_context"]
    trained, found = plain.predict_proba(x, a)[:, :, 0], served.predict_proba(x, a)[:, :, 0]
    soft = np.sqrt(trained)
    n = trained.shape[1]
    wanted = 0.75 * soft / soft.sum(1, keepdims=True) + 0.25 / n
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    action = TEST["action"]
    own = served.log_prob(x, action, a)
    np.testing.assert_allclose(np.exp(own), wanted[np.arange(len(action)), action], rtol=1e-5)
    with pytest.raises(ConfigError, match="uniform"):
        learner(serving={"uniform": 2.0})
    limits = {"feature": "age", "below": 7.0, "at_most": 0.1}
    with pytest.raises(ConfigError, match="new_items reads a feature of a run's catalogue"):
        learner(serving={"new_items": limits})


@pytest.mark.parametrize("objective", [*sorted({*OBJECTIVES} - {"behavior_cloning"}), "auto"])
def test_every_objective_beats_the_logging_policy(objective: str) -> None:
    """Learning from 1,500 rows; the logging policy is worth what softmax(q) is."""
    # Scores of squares lie between 0 and 1.
    temperature = 0.05 if objective == "implicit_squares" else 1.0
    fitted = learner(
        objective=objective, epochs=12, temperature=temperature, auto={"epochs": 8}
    ).fit(needed(TRAIN))
    logging = (TEST["pi_b"][:, :, 0] * TEST["expected_reward"]).sum(1).mean()
    assert value(fitted) > logging + 0.01


def test_cloning_ends_at_the_logging_policy() -> None:
    """Nearer to it than the uniform policy is, in KL, and worth as much."""
    world = ObpWorld(8, 4, 3, beta=3.0, seed=142)
    train, test = world.sample(3000, 1), world.sample(3000, 2)
    fitted = learner(objective="behavior_cloning", epochs=12).fit(needed(train))
    logging = test["pi_b"][:, :, 0]
    pi = fitted.predict_proba(test["context"], test["action_context"])[:, :, 0]

    def distance(other: np.ndarray | float) -> float:
        return float((logging * np.log(logging / other)).sum(1).mean())

    assert distance(pi) < 0.3 * distance(1 / 8)
    worth = [float((one * test["expected_reward"]).sum(1).mean()) for one in (pi, logging)]
    assert worth[0] == pytest.approx(worth[1], abs=0.01)


def test_shapes_and_agreement() -> None:
    fitted = learner(objective="ips", item_bias=True, temperature=0.5).fit(needed(TRAIN))
    x, a = TEST["context"][:50], TEST["action_context"]
    pi = fitted.predict_proba(x, a)
    assert pi.shape == (50, 8, 1)
    np.testing.assert_allclose(pi.sum(1), 1.0, atol=1e-12)
    action = TEST["action"][:50]
    np.testing.assert_allclose(
        fitted.log_prob(x, action, a), np.log(pi[np.arange(50), action, 0]), atol=1e-5
    )
    assert fitted.embed_contexts(x).shape == (50, 32)
    assert fitted.embed_items(a).shape == (8, 32)
    assert len(fitted.history_) == 4


def test_more_items_than_in_training_are_scored_from_features() -> None:
    fitted = learner(objective="regression").fit(needed(TRAIN))
    more = np.vstack([TEST["action_context"], np.ones((3, 3))])
    assert fitted.predict_proba(TEST["context"][:5], more).shape == (5, 11, 1)


def test_equal_seeds_give_equal_policies() -> None:
    one, two, other = (
        learner(objective="dr", random_state=s, dropout=0.1).fit(needed(TRAIN)) for s in (1, 1, 2)
    )
    x, a = TEST["context"][:20], TEST["action_context"]
    np.testing.assert_array_equal(one.predict_proba(x, a), two.predict_proba(x, a))
    assert not np.array_equal(one.predict_proba(x, a), other.predict_proba(x, a))


def test_validation_keeps_the_epoch_with_the_best_lower_bound() -> None:
    fitted = learner(objective="ips", epochs=25, learning_rate=0.02, patience=4).fit(
        needed(TRAIN), needed(VALIDATION)
    )
    lows = [line["validation"]["low"] for line in fitted.history_]
    best = int(np.argmax(lows))
    assert len(lows) <= 25
    if len(lows) < 25:
        assert len(lows) - 1 - best == 4
    # The kept policy is that of the best epoch: evaluated again, it has the same value.
    from offtower.data.convert import from_bandit_feedback

    log, _ = from_bandit_feedback(needed(VALIDATION))
    assert log.num_rows == 800
    log_pi = fitted.log_prob(
        VALIDATION["context"], VALIDATION["action"], VALIDATION["action_context"]
    )
    weight = np.exp(log_pi) / VALIDATION["pscore"]
    snips = (weight * VALIDATION["reward"]).sum() / weight.sum()
    assert snips == pytest.approx(fitted.history_[best]["validation"]["value"], abs=1e-5)


def test_expected_rewards_are_reported_and_not_used() -> None:
    """A hook that lies about the truth changes nothing that is learned."""
    plain = learner(objective="ips").fit(needed(TRAIN), needed(VALIDATION))
    lied = learner(objective="ips").fit(
        needed(TRAIN), needed(VALIDATION), on_epoch_end=lambda policy, epoch: {"true_value": -epoch}
    )
    assert [line["true_value"] for line in lied.history_] == [0, -1, -2, -3]
    x, a = TEST["context"][:20], TEST["action_context"]
    np.testing.assert_array_equal(plain.predict_proba(x, a), lied.predict_proba(x, a))


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in needed(TRAIN).items() if k != key}


@pytest.mark.parametrize(
    ("options", "feedback", "error", "message"),
    [
        ({"objective": "ips"}, without("pscore"), ConfigError, "needs the logged propensities"),
        (
            {"objective": "dr", "reward_model": {"kind": "none"}},
            needed(TRAIN),
            ConfigError,
            "needs a reward model",
        ),
        ({}, without("context"), DataError, "context"),
        ({}, {**needed(TRAIN), "context": np.zeros((1500, 3))}, DataError, r"\(rows, 4\)"),
        (
            {},
            {**needed(TRAIN), "pscore": np.zeros(1500)},
            DataError,
            r"expected a probability in \(0, 1\]",
        ),
        (
            {},
            {**needed(TRAIN), "action": np.full(1500, 8)},
            DataError,
            "expected the id of an item in the catalogue",
        ),
    ],
)
def test_invalid_arguments_raise(
    options: dict[str, Any], feedback: dict[str, Any], error: type[OfftowerError], message: str
) -> None:
    with pytest.raises(error, match=message):
        learner(**options).fit(feedback)


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match=r"TwoTowerPolicyLearner: 'training.epochs'"):
        learner(epochs=0)
    with pytest.raises(ConfigError, match="did you mean 'folds'"):
        learner(reward_model={"kind": "dense", "fold": 3})
    with pytest.raises(ConfigError, match="not fitted yet"):
        learner().predict_proba(TEST["context"], TEST["action_context"])
