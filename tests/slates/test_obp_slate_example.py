"""The slate example of OBP's documentation: 10 items, 3 positions, uniform logging, 10,000 rounds.

The printed figures are those of OBP 0.5.2, examples/quickstart/synthetic_slate.ipynb, whose table
lists means over 1,000 bootstrap samples. OBP 0.5.2 and 0.5.5 standardize the rewards' logits, as
here; 0.4.1 and 0.5.7 have other reward functions, and so print other figures. Contexts, actions,
propensities and draws of rewards are those of the installed OBP. OBP's reward function gives the
i-th round that it receives the rewards of context i // 3, logged and true alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from offtower.data.convert_slates import from_slate_feedback
from offtower.data.rounds import Rounds
from offtower.evaluation import EvaluationRows, evaluate_rows
from offtower.evaluation.estimators import IPS
from offtower.evaluation.selection.interaction import choose_interaction
from offtower.slates import conditional_log_prob, position_marginals, slate_weights

Array = NDArray[np.float64]

ROUNDS, ITEMS, POSITIONS, SEED = 10_000, 10, 3, 12345
SLATES = np.array(list(permutations(range(ITEMS), POSITIONS)))
TRUTH_ROUNDS = 3334
"""OBP computes true values, and so the standardization, by batches of as many rounds."""

FACTOR = {"random": 0.0, "optimal": 3.0, "anti-optimal": -3.0}
"""Logits of each policy per expected reward."""
TRUTH = {"random": 1.644826, "optimal": 1.612541, "anti-optimal": 1.689333}
PRINTED = {
    "random": {"standard": 1.646317, "independent": 1.646317, "cascade": 1.646317},
    "optimal": {"standard": 1.629474, "independent": 1.674750, "cascade": 1.626834},
    "anti-optimal": {"standard": 1.691671, "independent": 1.602862, "cascade": 1.687415},
}
"""Means over bootstrap samples."""
ESTIMATES = {
    "random": {"standard": 1.646100, "independent": 1.646100, "cascade": 1.646100},
    "optimal": {"standard": 1.629355, "independent": 1.674579, "cascade": 1.626730},
    "anti-optimal": {"standard": 1.691832, "independent": 1.602534, "cascade": 1.687098},
}
"""The estimates themselves: `estimate_policy_value` of OBP 0.5.2."""


def base_logits(context: Array) -> Array:
    """(n, 10) standardized logits, bilinear in (1, x) and (1, one-hot item)."""
    rng = np.random.RandomState(SEED)
    x = np.insert(context, 0, 1.0, axis=1)
    item = np.insert(np.eye(ITEMS), 0, 1.0, axis=1)
    of_context = rng.uniform(-1, 1, x.shape[1])
    of_item = rng.uniform(-1, 1, item.shape[1])
    of_both = rng.uniform(-1, 1, (x.shape[1], item.shape[1]))
    logits = (x @ of_context)[:, None] + item @ of_item + x @ of_both @ item.T
    return (logits - logits.mean()) / logits.std()


def sigmoid(x: Array) -> Array:
    return np.exp(np.minimum(x, 0)) / (1.0 + np.exp(-np.abs(x)))


def half(x: Array) -> Array:
    """Rounded to half precision."""
    return x.astype(np.float16).astype(np.float64)


def half_sigmoid(x: Array) -> Array:
    """As half precision computes it, each operation rounded, without NumPy's float16 functions,
    whose last bit depends on the machine."""
    x = half(x)
    return half(half(np.exp(np.minimum(x, 0))) / half(1.0 + half(np.exp(-np.abs(x)))))


def expected_reward(logits: Array, slate, effect: Array):
    """(n, S, 3) of slates (n or 1, S, 3): item a_k's logit plus the effects of the items above.

    In half precision as in OBP, whose draws depend on the last bit, and with its contexts.
    """
    context = np.arange(len(logits)) // POSITIONS
    total = logits[context[:, None, None], slate]
    for k in range(POSITIONS):
        for above in range(k):
            total[..., k] += effect[slate[..., k], slate[..., above]]
    return half_sigmoid(total)


def softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Example:
    """OBP's slate dict, the effects of items above, and the policies' single draws (n, 10)."""

    feedback: dict
    effect: Array
    policies: dict[str, Array]

    def rows(self, policy: str) -> dict[str, EvaluationRows]:
        """By interaction, with the weights of this package."""
        log, _ = from_slate_feedback(self.feedback)
        names = ("slate_id", "position", "action", "pscore", "pscore_item_position", "reward")
        column = {name: log.table.column(name).to_numpy().copy() for name in names}
        rounds = Rounds.of(column["slate_id"], column["position"])
        grid = column["action"].reshape(ROUNDS, POSITIONS)
        log_prob = torch.from_numpy(np.log(self.policies[policy]))
        shown = log_prob.gather(1, torch.from_numpy(grid)).reshape(-1)
        log_pscore = torch.from_numpy(np.log(column["pscore"]))
        weights = slate_weights(
            conditional_log_prob(shown, rounds), log_pscore, rounds, "conditional"
        )
        marginal = np.stack(
            [
                position_marginals(log_prob, k).numpy()[np.arange(ROUNDS), grid[:, k]]
                for k in range(POSITIONS)
            ],
            axis=1,
        )
        by_interaction = {
            "standard": weights.of("standard").exp().numpy(),
            "cascade": weights.of("cascade").exp().numpy(),
            "independent": marginal.reshape(-1) / column["pscore_item_position"],
        }
        reward = column["reward"].astype(np.float64)
        return {
            name: EvaluationRows(importance_weight=weight, reward=reward, round=rounds.number)
            for name, weight in by_interaction.items()
        }


@pytest.fixture(scope="module")
def example() -> Example:
    pytest.importorskip("obp")
    from obp.dataset import SyntheticSlateBanditDataset

    def base_reward(context, action_context, random_state=None):
        return sigmoid(base_logits(context))

    def reward_function(*, context, action, action_interaction_weight_matrix, **_):
        slate = action.reshape(-1, 1, POSITIONS)
        return expected_reward(base_logits(context), slate, action_interaction_weight_matrix)[:, 0]

    dataset = SyntheticSlateBanditDataset(
        n_unique_action=ITEMS,
        len_list=POSITIONS,
        dim_context=2,
        reward_type="binary",
        reward_structure="cascade_additive",
        click_model=None,
        random_state=SEED,
        behavior_policy_function=None,
        base_reward_function=base_reward,
    )
    # OBP 0.4.1 rounds to half precision before the effects too, which changes three rewards.
    dataset.reward_function = reward_function
    feedback = dataset.obtain_batch_bandit_feedback(ROUNDS, return_pscore_item_position=True)
    reward = sigmoid(base_logits(feedback["context"]))
    policies = {name: softmax(factor * reward) for name, factor in FACTOR.items()}
    return Example(feedback, dataset.action_interaction_weight_matrix, policies)


def estimate(rows: EvaluationRows) -> float:
    found = evaluate_rows({"p": rows}, [IPS()], reward_range=(0.0, 1.0))
    return found.policies["p"].estimates["ips"].estimate.value


@pytest.mark.parametrize("policy", FACTOR)
def test_estimates_equal_the_printed_ones(example, policy):
    from obp.utils import estimate_confidence_interval_by_bootstrap

    for interaction, rows in example.rows(policy).items():
        assert estimate(rows) == pytest.approx(ESTIMATES[policy][interaction], abs=6e-7)
        by_round = (rows.importance_weight * rows.reward).reshape(ROUNDS, -1).sum(axis=1)
        bootstrap = estimate_confidence_interval_by_bootstrap(
            by_round, n_bootstrap_samples=1000, random_state=SEED
        )
        assert bootstrap["mean"] == pytest.approx(PRINTED[policy][interaction], abs=6e-7)


def test_true_values_equal_the_printed_ones(example):
    total = dict.fromkeys(FACTOR, 0.0)
    for start in range(0, ROUNDS, TRUTH_ROUNDS):
        part = slice(start, start + TRUTH_ROUNDS)
        logits = base_logits(example.feedback["context"][part])
        reward = half(expected_reward(logits, SLATES[None], example.effect).sum(axis=2))
        for name, single in example.policies.items():
            probability, left = np.ones(reward.shape), np.ones(reward.shape)
            for k in range(POSITIONS):
                item = single[part][:, SLATES[:, k]]
                probability *= item / left
                left -= item
            total[name] += (probability * reward).sum()
    for name, value in total.items():
        assert value / ROUNDS == pytest.approx(TRUTH[name], abs=6e-7)


def test_independent_orders_the_policies_wrongly_and_is_not_chosen(example):
    rows = {name: example.rows(name) for name in ("optimal", "anti-optimal")}
    value = {name: {way: estimate(one) for way, one in of.items()} for name, of in rows.items()}
    assert TRUTH["optimal"] < TRUTH["anti-optimal"]
    assert value["optimal"]["independent"] > value["anti-optimal"]["independent"]
    for way in ("standard", "cascade"):
        assert value["optimal"][way] < value["anti-optimal"][way]
    for name, of in rows.items():
        found = choose_interaction(of)
        assert found.chosen == "cascade", name
        assert "depends on the item at its position alone" in found.rejected["independent"]
        assert "from 'standard'" in found.rejected["independent"]
