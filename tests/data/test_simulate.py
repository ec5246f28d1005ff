from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch

from offtower.data.simulate import (
    LoggingPolicy,
    ObpWorld,
    SimulatedWorld,
    WorldSettings,
    multi_policy_log,
    obp_synthetic,
    propensity_column,
    true_value,
)
from offtower.data.simulate.features import CONTEXT_NAMES, Side, vector_array, vector_matrix
from offtower.errors import ConfigError, DataError, MissingExtraError


def all_logits(world: SimulatedWorld, contexts: pa.Table) -> np.ndarray:
    """(n, N) z(x, a), by enumeration."""
    latent = world.context_latent(contexts).numpy()
    return latent @ world.item_latent.numpy().T + world.item_logit.numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def drawn(
    world: SimulatedWorld, n: int, seed: int = 0, policy: LoggingPolicy | None = None
) -> pa.Table:
    return pa.concat_tables(world.log(n, seed, policy=policy)).combine_chunks()


@pytest.mark.parametrize("kinds", ["vector", "all"])
def test_pscore_is_the_exact_probability(kinds: str) -> None:
    world = SimulatedWorld(
        23, WorldSettings(feature_kinds=kinds), seed=4, logging=LoggingPolicy(beta=1.3, epsilon=0.2)
    )
    log = drawn(world, 3000, seed=1)
    policy = 0.8 * softmax(1.3 * all_logits(world, log)) + 0.2 / 23
    action = log["action"].to_numpy()
    assert log["pscore"].type == pa.float64()
    expected = policy[np.arange(3000), action]
    np.testing.assert_allclose(log["pscore"].to_numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("logging", ["contextual", "popularity"])
def test_a_log_of_several_policies_knows_each_ones_probabilities(logging: str) -> None:
    """Against enumeration; rows in turn, also where the chunks of the policies differ in number."""
    world = SimulatedWorld(
        11, WorldSettings(3, 3, 3, string_ids=True), seed=4, logging=LoggingPolicy(logging)
    )
    policies = {
        name: LoggingPolicy(logging, beta, 0.1)
        for name, beta in (("low", -1.0), ("high", 2.0), ("flat", 0.0))
    }
    log = pa.concat_tables(multi_policy_log(world, 3 * 4096 + 2, 7, policies)).combine_chunks()
    assert log.num_rows == 3 * 4096 + 2
    assert log["behavior_policy"].to_pylist()[:4] == ["low", "high", "flat", "low"]
    logits = all_logits(world, log)
    if logging == "popularity":
        logits = np.tile(world.item_logit.numpy(), (len(logits), 1))
    ids = world.item_ids.to_pylist()
    action = np.array([ids.index(one) for one in log["action"].to_pylist()])
    rows = np.arange(len(action))
    names = log["behavior_policy"].to_numpy(zero_copy_only=False)
    for name, policy in policies.items():
        expected = (0.9 * softmax(policy.beta * logits) + 0.1 / 11)[rows, action]
        found = log[propensity_column(name)].to_numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        own = names == name
        np.testing.assert_allclose(log["pscore"].to_numpy()[own], found[own], rtol=1e-12)


def test_a_log_of_several_policies_needs_several() -> None:
    world = SimulatedWorld(5, WorldSettings(2, 2, 2))
    one, two = LoggingPolicy(), LoggingPolicy("popularity")
    for rows, policies in ((9, {"a": one}), (1, {"a": one, "b": one}), (9, {"a": one, "b": two})):
        with pytest.raises(ConfigError, match=r"two or more|this world's kind"):
            multi_policy_log(world, rows, 0, policies)


def test_actions_and_rewards_follow_their_probabilities() -> None:
    """z-scores of sums over 40,000 rounds; 5 standard deviations: false alarm 6e-7 per number."""
    world = SimulatedWorld(7, seed=2, logging=LoggingPolicy(epsilon=0.3))
    log = drawn(world, 40_000, seed=9)
    logits = all_logits(world, log)
    policy = 0.7 * softmax(logits) + 0.3 / 7
    action = log["action"].to_numpy()
    shown = np.eye(7)[action]
    z = (shown - policy).sum(axis=0) / np.sqrt((policy * (1 - policy)).sum(axis=0))
    assert np.abs(z).max() < 5
    # also where the policy depends on the context
    direction = logits[:, [3]] - logits.mean()
    z = ((shown - policy) * direction).sum(axis=0)
    z /= np.sqrt((policy * (1 - policy) * direction**2).sum(axis=0))
    assert np.abs(z).max() < 5
    q = sigmoid(logits[np.arange(40_000), action])
    reward = log["reward"].to_numpy()
    assert set(np.unique(reward)) == {0.0, 1.0}
    assert abs((reward - q).sum() / np.sqrt((q * (1 - q)).sum())) < 5


def test_continuous_rewards_have_mean_q() -> None:
    world = SimulatedWorld(7, WorldSettings(reward="continuous"), seed=2)
    log = drawn(world, 20_000)
    q = sigmoid(all_logits(world, log)[np.arange(20_000), log["action"].to_numpy()])
    error = log["reward"].to_numpy() - q
    assert abs(error.sum() / np.sqrt((q * (1 - q) / 5).sum())) < 5
    assert 0 <= log["reward"].to_numpy().min() <= log["reward"].to_numpy().max() <= 1


def test_the_popularity_policy() -> None:
    """z-scores over 40,000 rounds; 5 standard deviations: false alarm 6e-7 per number."""
    world = SimulatedWorld(9, seed=2, logging=LoggingPolicy("popularity", 2.0, 0.3))
    log = drawn(world, 40_000)
    policy = 0.7 * softmax(2.0 * world.item_logit.numpy()[None, :])[0] + 0.3 / 9
    action = log["action"].to_numpy()
    np.testing.assert_allclose(log["pscore"].to_numpy(), policy[action], rtol=1e-12)
    z = (np.bincount(action, minlength=9) - 40_000 * policy) / np.sqrt(
        40_000 * policy * (1 - policy)
    )
    assert np.abs(z).max() < 5
    contexts = world.contexts(100)
    expected = (sigmoid(all_logits(world, contexts)) * policy).sum(axis=1)
    np.testing.assert_allclose(world.logging_rewards(contexts), expected, rtol=1e-10)


@pytest.mark.parametrize("kinds", ["vector", "all"])
def test_policy_rewards_equal_enumeration(kinds: str) -> None:
    world = SimulatedWorld(31, WorldSettings(feature_kinds=kinds), seed=5)
    contexts = world.contexts(50, seed=3)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 3, generator=generator)
    items = torch.randn(31, 3, generator=generator)
    bias = torch.randn(31, generator=generator)

    def embed(table: pa.Table) -> torch.Tensor:
        column = table["context"].combine_chunks()
        return torch.from_numpy(vector_matrix(column, 8).copy()) @ weight

    rewards = world.policy_rewards(
        contexts, embed, items, temperature=0.7, item_bias=bias, chunk_rows=16
    )
    logits = (embed(contexts).double() @ items.double().T / 0.7 + bias.double()).numpy()
    q = sigmoid(all_logits(world, contexts))
    np.testing.assert_allclose(rewards, (softmax(logits) * q).sum(axis=1), rtol=1e-10)
    value = world.true_value(embed, items, temperature=0.7, item_bias=bias, n_contexts=50, seed=3)
    assert value.value == pytest.approx(rewards.mean(), rel=1e-12)
    assert value.std_error == pytest.approx(rewards.std(ddof=1) / np.sqrt(50), rel=1e-12)


def test_values_of_simple_policies_equal_enumeration() -> None:
    world = SimulatedWorld(19, seed=5, logging=LoggingPolicy(beta=0.8, epsilon=0.25))
    contexts = world.contexts(300, seed=1)
    logits = all_logits(world, contexts)
    q = sigmoid(logits)
    logging_policy = 0.75 * softmax(0.8 * logits) + 0.25 / 19
    expected = (logging_policy * q).sum(axis=1)
    np.testing.assert_allclose(world.logging_rewards(contexts), expected, rtol=1e-10)
    np.testing.assert_allclose(world.uniform_rewards(contexts), q.mean(axis=1), rtol=1e-10)
    np.testing.assert_allclose(world.best_rewards(contexts), q.max(axis=1), rtol=1e-10)
    best = world.best_fixed_item(300, seed=1)
    assert best.item == int(q.mean(axis=0).argmax())
    fresh = sigmoid(all_logits(world, world.contexts(300, seed=2)))[:, best.item]
    assert best.value == pytest.approx(fresh.mean(), rel=1e-10)
    np.testing.assert_allclose(
        world.expected_reward(contexts, np.full(300, 4)), q[:, 4], rtol=1e-12
    )


def test_the_log_earns_the_value_of_its_policy() -> None:
    """Difference of two independent means; 5 standard errors: false alarm 6e-7."""
    world = SimulatedWorld(50, seed=8)
    reward = drawn(world, 30_000, seed=2)["reward"].to_numpy()
    truth = world.value_of_logging_policy(20_000, seed=3)
    error = np.hypot(reward.std() / np.sqrt(30_000), truth.std_error)
    assert abs(reward.mean() - truth.value) < 5 * error
    assert world.value_of_uniform_policy().value < truth.value
    assert truth.value < world.value_of_best_policy().value


def test_importance_weights_average_to_one_between_policies() -> None:
    world = SimulatedWorld(20, seed=3, logging=LoggingPolicy(epsilon=0.5))
    log = drawn(world, 30_000)
    other = 0.9 * softmax(-all_logits(world, log)) + 0.1 / 20
    weight = other[np.arange(30_000), log["action"].to_numpy()] / log["pscore"].to_numpy()
    assert abs(weight.mean() - 1) < 5 * weight.std() / np.sqrt(30_000)
    second = drawn(world, 100, policy=LoggingPolicy(beta=-1.0, epsilon=0.1))
    expected = 0.9 * softmax(-all_logits(world, second)) + 0.1 / 20
    np.testing.assert_allclose(
        second["pscore"].to_numpy(),
        expected[np.arange(100), second["action"].to_numpy()],
        rtol=1e-10,
    )


def test_logs_repeat_and_differ_by_seed() -> None:
    world = SimulatedWorld(11, WorldSettings(feature_kinds="all"), seed=1)
    again = SimulatedWorld(11, WorldSettings(feature_kinds="all"), seed=1)
    assert drawn(world, 5000, seed=4).equals(drawn(again, 5000, seed=4))
    assert not drawn(world, 50, seed=4).equals(drawn(world, 50, seed=5))
    assert not drawn(world, 50).equals(
        drawn(SimulatedWorld(11, WorldSettings(feature_kinds="all"), seed=2), 50)
    )
    assert world.contexts(40, 1).equals(again.contexts(40, 1))
    # two chunks of rows are different rows
    vectors = vector_matrix(drawn(world, 8192)["context"].combine_chunks(), 8)
    assert not np.array_equal(vectors[:4096], vectors[4096:])


def test_columns_of_the_log() -> None:
    world = SimulatedWorld(
        11, WorldSettings(feature_kinds="all", n_users=5, string_ids=True), seed=1
    )
    log = drawn(world, 100)
    assert set(world.log_schema.columns) <= set(log.column_names)
    assert set(log["action"].to_pylist()) <= set(world.catalogue_table()["item_id"].to_pylist())
    assert set(log["user_id"].to_pylist()) == set(range(5))
    assert set(log["behavior_policy"].to_pylist()) == {"logging"}
    assert (np.diff(log["timestamp"].to_numpy()) > np.timedelta64(0)).all()
    assert [] in log["interests"].to_pylist()
    catalogue = world.catalogue()
    assert catalogue.num_items == 11
    assert [spec.kind for spec in world.catalogue_schema.features] == [
        "vector",
        "numeric",
        "category",
        "bag",
    ]


def test_a_large_catalogue_needs_no_array_of_rounds_by_items() -> None:
    world = SimulatedWorld(200_000, WorldSettings(dim_item=4, latent_dim=4), seed=1)
    log = drawn(world, 64)
    latent = world.context_latent(log)
    action = torch.from_numpy(log["action"].to_numpy().copy())
    logits = latent @ world.item_latent.T + world.item_logit
    expected = 0.9 * torch.softmax(logits, dim=1) + 0.1 / 200_000
    chosen = expected.gather(1, action[:, None])[:, 0].numpy()
    np.testing.assert_allclose(log["pscore"].to_numpy(), chosen, rtol=1e-9)
    value = world.value_of_logging_policy(64, seed=1)
    q = torch.sigmoid(
        world.context_latent(world.contexts(64, 1)) @ world.item_latent.T + world.item_logit
    )
    logits = world.context_latent(world.contexts(64, 1)) @ world.item_latent.T + world.item_logit
    policy = 0.9 * torch.softmax(logits, dim=1) + 0.1 / 200_000
    assert value.value == pytest.approx(float((policy * q).sum(1).mean()), rel=1e-9)


def test_the_state_has_unit_variance_and_needs_every_feature() -> None:
    side = Side(CONTEXT_NAMES, 400, "all", np.random.default_rng(0), categories=200, tags=200)
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((2000, 400)).astype(np.float32)
    table = pa.table(side.columns(vectors, rng))
    state = side.state(table)
    # 400 x 2000 numbers, but shared parameters: a loose bound on the mean of squares
    assert 0.9 < (state**2).mean() < 1.1
    for name in ("activity", "segment", "interests"):
        other = table.set_column(
            table.column_names.index(name), name, table[name].take(pa.array(np.arange(2000)[::-1]))
        )
        assert np.abs(side.state(other) - state).max() > 0.1
    with pytest.raises(DataError, match="never draws"):
        side.state(table.set_column(2, "segment", pa.array(["moon"] * 2000)))
    with pytest.raises(DataError, match="no column 'segment'"):
        side.state(table.drop_columns("segment"))


def test_vector_columns_round_trip() -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    column = vector_array(values)
    np.testing.assert_array_equal(vector_matrix(column, 3), values)
    np.testing.assert_array_equal(vector_matrix(column.slice(1, 2), 3), values[1:3])
    with pytest.raises(DataError, match="have 2 numbers"):
        vector_matrix(column, 2)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: SimulatedWorld(0), "n_items"),
        (lambda: WorldSettings(latent_dim=0), "latent_dim"),
        (lambda: LoggingPolicy(epsilon=1.5), "epsilon"),
        (lambda: WorldSettings(reward="rating"), "reward"),
        (lambda: LoggingPolicy("random"), "logging"),
        (lambda: WorldSettings(feature_kinds="text"), "feature_kinds"),
    ],
)
def test_arguments_out_of_range(made: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made()
    with pytest.raises(ConfigError, match="number of rows"):
        SimulatedWorld(3).contexts(0)


class TestObp:
    def test_two_logs_of_one_world(self) -> None:
        train = obp_synthetic(300, n_actions=6, dim_context=4, beta=2.0, seed=1)
        test = obp_synthetic(200, n_actions=6, dim_context=4, beta=2.0, seed=2)
        np.testing.assert_array_equal(train["action_context"], test["action_context"])
        assert not np.array_equal(train["context"][:200], test["context"])
        # The same world: logit(q) is linear in x with one set of coefficients for both logs.
        for action in range(6):
            logit = [
                np.log(f["expected_reward"][:, action] / (1 - f["expected_reward"][:, action]))
                for f in (train, test)
            ]
            with_constant = [np.c_[f["context"], np.ones(len(f["context"]))] for f in (train, test)]
            coefficients = np.linalg.lstsq(with_constant[0], logit[0], rcond=None)[0]
            np.testing.assert_allclose(with_constant[1] @ coefficients, logit[1], atol=1e-9)
            # action_context enters with coefficients in [0, 1], as the contexts do
            assert ((coefficients[:4] >= 0) & (coefficients[:4] <= 1)).all()

    def test_the_dict_and_the_logging_policy(self) -> None:
        feedback = obp_synthetic(500, n_actions=6, beta=3.0, seed=5)
        assert feedback["n_rounds"] == 500 and feedback["n_actions"] == 6
        assert feedback["position"] is None
        expected = softmax(3.0 * feedback["expected_reward"])
        np.testing.assert_allclose(feedback["pi_b"][:, :, 0], expected, rtol=1e-12)
        chosen = expected[np.arange(500), feedback["action"]]
        np.testing.assert_allclose(feedback["pscore"], chosen, rtol=1e-12)
        again = obp_synthetic(500, n_actions=6, beta=3.0, seed=5)
        np.testing.assert_array_equal(feedback["reward"], again["reward"])
        np.testing.assert_array_equal(feedback["action"], again["action"])

    def test_rewards_and_actions_are_independent_given_their_means(self) -> None:
        """Binary rewards are unbiased; 5 standard deviations: false alarm 6e-7."""
        feedback = obp_synthetic(20_000, seed=3)
        q = feedback["expected_reward"][np.arange(20_000), feedback["action"]]
        assert abs((feedback["reward"] - q).sum() / np.sqrt((q * (1 - q)).sum())) < 5
        policy = feedback["pi_b"][:, :, 0]
        shown = np.eye(10)[feedback["action"]]
        z = (shown - policy).sum(axis=0) / np.sqrt((policy * (1 - policy)).sum(axis=0))
        assert np.abs(z).max() < 5

    def test_true_value(self) -> None:
        world = ObpWorld(n_actions=4, dim_context=3, dim_action_context=2, seed=9)
        feedback = world.sample(100, seed=0)
        np.testing.assert_array_equal(
            world.expected_reward(feedback["context"]), feedback["expected_reward"]
        )
        assert feedback["action_context"].shape == (4, 2)
        uniform = np.full((100, 4, 1), 0.25)
        assert true_value(feedback, uniform) == pytest.approx(feedback["expected_reward"].mean())
        assert true_value(feedback, uniform[:, :, 0]) == true_value(feedback, uniform)
        with pytest.raises(ConfigError, match="action_dist must have shape"):
            true_value(feedback, np.ones((4, 100)))

    def test_logging_is_left_alone(self) -> None:
        root = logging.getLogger()
        before = (root.level, list(root.handlers))
        obp_synthetic(10)
        assert (root.level, list(root.handlers)) == before

    def test_without_obp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [n for n in sys.modules if n == "obp" or n.startswith("obp.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "obp", None)
        with pytest.raises(MissingExtraError, match=r'pip install "offtower\[obp\]"'):
            obp_synthetic(10)

    def test_too_few_actions(self) -> None:
        with pytest.raises(ConfigError, match="at least 2 actions"):
            ObpWorld(n_actions=1)
