"""OBP's slate dict and estimators, and the choice among them."""

from __future__ import annotations

import numpy as np
import pytest

from offtower.data.check import check_table
from offtower.data.convert_slates import from_slate_feedback, to_slate_feedback
from offtower.data.log import TableOrigin
from offtower.errors import DataError
from offtower.evaluation import EvaluationRows, evaluate_rows
from offtower.evaluation.estimators import IPS, SNIPS
from offtower.evaluation.selection.interaction import InteractionSums, choose_interaction

from .worlds import ITEMS, POSITIONS, SLATES, SlateWorld, conditionals


def slate_dict(rounds=50, seed=0):
    """As OBP's `SyntheticSlateBanditDataset.obtain_batch_bandit_feedback` returns it."""
    world, rng = SlateWorld.make(seed), np.random.default_rng(seed)
    x, slate, reward = world.draw(rounds, rng)
    cascade = conditionals(world.logging)[x, slate].cumprod(axis=1)
    return {
        "n_rounds": rounds,
        "n_unique_action": ITEMS,
        "slate_id": np.repeat(np.arange(rounds), POSITIONS),
        "context": rng.normal(size=(rounds, 2)),
        "action_context": np.eye(ITEMS),
        "action": SLATES[slate].reshape(-1),
        "position": np.tile(np.arange(POSITIONS), rounds),
        "reward": reward.reshape(-1),
        "pscore_cascade": cascade.reshape(-1),
        "pscore": np.repeat(cascade[:, -1], POSITIONS),
        "pscore_item_position": rng.uniform(0.1, 1.0, rounds * POSITIONS),
    }


def test_the_slate_dict_converts_both_ways():
    given = slate_dict()
    log, catalogue = from_slate_feedback(given)
    assert log.schema.pscore_kind == "conditional"
    assert check_table(log.table, log.schema, catalogue, TableOrigin("f"), 0) == []
    back = to_slate_feedback(log, catalogue)
    assert set(back) == set(given)
    for key, value in given.items():
        np.testing.assert_allclose(back[key], value, rtol=1e-12, err_msg=key)


def test_pscores_of_whole_slates_and_marginal_ones():
    given = slate_dict()
    del given["pscore_cascade"]
    log, catalogue = from_slate_feedback(given)
    assert log.schema.pscore_kind == "slate"
    assert "pscore_cascade" not in to_slate_feedback(log, catalogue)
    del given["pscore"]
    assert from_slate_feedback(given)[0].schema.pscore_kind == "marginal"


@pytest.mark.parametrize("key", ["pscore", "pscore_cascade"])
def test_propensities_that_do_not_multiply_to_the_slates_are_refused(key):
    given = slate_dict()
    given[key] = given[key].copy()
    given[key][5] *= 1.01
    with pytest.raises(DataError, match="whole slate; they must be equal"):
        from_slate_feedback(given)


def test_slates_of_different_lengths_have_no_dict():
    log, catalogue = from_slate_feedback(slate_dict())
    short = type(log)(log.table.slice(0, 5), log.schema)
    with pytest.raises(DataError, match="equal lengths"):
        to_slate_feedback(short, catalogue)


def interactions(weights, reward, rounds):
    number = np.repeat(np.arange(rounds), POSITIONS)
    return {
        name: EvaluationRows(importance_weight=weight, reward=reward, round=number)
        for name, weight in weights.items()
    }


def test_estimates_equal_those_of_obp():
    """Values to ten digits, and the standard error by round."""
    pytest.importorskip("obp")
    from obp.dataset import SyntheticSlateBanditDataset, logistic_reward_function
    from obp.ope import SlateIndependentIPS, SlateRewardInteractionIPS, SlateStandardIPS

    rounds = 300
    dataset = SyntheticSlateBanditDataset(
        n_unique_action=6,
        len_list=POSITIONS,
        dim_context=2,
        reward_type="binary",
        reward_structure="cascade_additive",
        random_state=12345,
        base_reward_function=logistic_reward_function,
    )
    found = dataset.obtain_batch_bandit_feedback(rounds, return_pscore_item_position=True)
    logit = 2.0 * np.random.default_rng(0).normal(size=(rounds, 6))
    joint, item, cascade = dataset.obtain_pscore_given_evaluation_policy_logit(
        action=found["action"], evaluation_policy_logit_=logit, return_pscore_item_position=True
    )
    common = {key: found[key] for key in ("slate_id", "reward", "position")}
    expected = {
        "standard": SlateStandardIPS(len_list=POSITIONS).estimate_policy_value(
            **common, pscore=found["pscore"], evaluation_policy_pscore=joint
        ),
        "independent": SlateIndependentIPS(len_list=POSITIONS).estimate_policy_value(
            **common,
            pscore_item_position=found["pscore_item_position"],
            evaluation_policy_pscore_item_position=item,
        ),
        "cascade": SlateRewardInteractionIPS(len_list=POSITIONS).estimate_policy_value(
            **common,
            pscore_cascade=found["pscore_cascade"],
            evaluation_policy_pscore_cascade=cascade,
        ),
    }
    weights = {
        "standard": joint / found["pscore"],
        "cascade": cascade / found["pscore_cascade"],
        "independent": item / found["pscore_item_position"],
    }
    for name, rows in interactions(weights, found["reward"].astype(float), rounds).items():
        estimate = evaluate_rows({"p": rows}, [IPS(), SNIPS()], reward_range=(0.0, 1.0))
        value = estimate.policies["p"].estimates["ips"].estimate
        assert value.value == pytest.approx(expected[name], rel=1e-10)
        sums = (weights[name] * found["reward"]).reshape(rounds, -1).sum(axis=1)
        assert value.std_error == pytest.approx(sums.std(ddof=1) / np.sqrt(rounds), rel=1e-9)


def weights_of(world, x, slate):
    """Weights of all three interactions, (rows,)."""
    pi_e, pi_0 = conditionals(world.target)[x, slate], conditionals(world.logging)[x, slate]
    marginal = []
    for probability in (world.target, world.logging):
        joint = world.slate_probability(probability)
        shares = [
            np.stack([joint[:, SLATES[:, k] == a].sum(axis=1) for a in range(ITEMS)], axis=1)
            for k in range(POSITIONS)
        ]
        marginal.append(np.stack(shares, axis=1)[x[:, None], np.arange(POSITIONS), SLATES[slate]])
    ratio = pi_e / pi_0
    return {
        "standard": np.repeat(ratio.prod(axis=1), POSITIONS),
        "cascade": ratio.cumprod(axis=1).reshape(-1),
        "independent": (marginal[0] / marginal[1]).reshape(-1),
    }


def follows_item_0(slate):
    """Rewards (rounds, 3) of 1 below item 0 alone, which no item earns by itself."""
    above = np.concatenate([np.full((len(slate), 1), -1), SLATES[slate][:, :-1]], axis=1)
    return (above == 0).astype(float)


def test_an_assumption_that_the_log_rejects_is_not_chosen():
    # The independent estimate is biased, the cascade is not: exactly, by enumeration.
    world = SlateWorld.make(11, distance=0.7)
    x = np.repeat(np.arange(world.contexts), len(SLATES))
    slate = np.tile(np.arange(len(SLATES)), world.contexts)
    reward = follows_item_0(slate)
    truth = (world.slate_probability(world.target)[x, slate] * reward.sum(axis=1)).sum()
    logging = np.repeat(world.slate_probability(world.logging)[x, slate], POSITIONS)
    exact = {
        name: (logging * weight * reward.reshape(-1)).sum()
        for name, weight in weights_of(world, x, slate).items()
    }
    assert exact["standard"] == pytest.approx(truth, abs=1e-10)
    assert exact["cascade"] == pytest.approx(truth, abs=1e-10)
    assert abs(exact["independent"] - truth) > 0.01 * truth
    # On a log of 60,000 rounds the bias shows, and the report says which assumption fails.
    rounds = 60_000
    x, slate, _ = world.draw(rounds, np.random.default_rng(0))
    rows = interactions(weights_of(world, x, slate), follows_item_0(slate).reshape(-1), rounds)
    found = choose_interaction(rows)
    assert found.chosen == "cascade"
    assert "depends on the item at its position alone" in found.rejected["independent"]
    assert "variance is smaller" in found.rejected["standard"]


def depends_on_later_items(rounds=20_000):
    """Rows as an evaluation scores them; a reward of 1 above item 6, whose true value is .216 and
    .403 under `cascade`."""
    world = SlateWorld.make(11, distance=0.7)
    x, slate, _ = world.draw(rounds, np.random.default_rng(0))
    weights = weights_of(world, x, slate)
    below = np.concatenate([SLATES[slate][:, 1:], np.full((rounds, 1), -1)], axis=1)
    return EvaluationRows(
        importance_weight=weights["cascade"],
        reward=(below == 6).astype(float).reshape(-1),
        round=np.repeat(np.arange(rounds), POSITIONS),
        earlier_weight=np.ones(rounds * POSITIONS),
        slate_weight=weights["standard"],
    )


def test_cascade_is_rejected_where_rewards_depend_on_later_items():
    rows = depends_on_later_items()
    found = InteractionSums.of_slates(rows).choose()
    assert found.chosen == "standard"
    (sentence,) = found.sentences()
    assert "'standard' is chosen and 'cascade' is not" in sentence
    assert "a reward does not depend on later items" in sentence


def test_merged_sums_choose_as_all_rounds_together():
    rows = depends_on_later_items(3000)
    parts = [InteractionSums.of_slates(rows.take(slice(a, a + 3000))) for a in (0, 3000, 6000)]
    merged = parts[0].merge(parts[1]).merge(parts[2]).choose()
    whole = choose_interaction({"standard": rows.standard(), "cascade": rows})
    for name in ("standard", "cascade"):
        assert merged.values[name] == pytest.approx(whole.values[name], rel=1e-12)
    assert (merged.chosen, merged.rejected) == (whole.chosen, whole.rejected)


def test_a_batch_without_support_has_sums():
    # A policy that takes none of a batch's slates; other batches of the log may have support.
    rows = depends_on_later_items(4)
    none = np.zeros(len(rows))
    found = InteractionSums.of_slates(
        EvaluationRows(
            importance_weight=none,
            reward=rows.reward,
            round=rows.round,
            earlier_weight=none,
            slate_weight=none,
        )
    )
    assert found.choose().values == {"standard": 0.0, "cascade": 0.0}


def test_rows_that_are_no_slates_have_no_interaction():
    assert InteractionSums.of_slates(depends_on_later_items(4).by_row()) is None


def test_differences_of_rounding_reject_nothing():
    rows = depends_on_later_items(1000)
    cascade = 1.0 + 1e-6 * np.random.default_rng(0).random(len(rows))
    served = {
        "standard": np.ones(len(rows)),
        "cascade": cascade,  # 1,000 rounds: about +5e-7, far beyond two standard errors
    }
    found = choose_interaction(interactions(served, np.ones(len(rows)), 1000))
    assert found.chosen == "cascade"
