"""Evaluation over eligible items, against probabilities over the whole catalogue in float64."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from offtower.config import PolicyConfig, ServingConfig, TowerConfig
from offtower.data.rows import EncodedRows
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.evaluation.scoring.rewards import CatalogueReward
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import DenseReward
from offtower.prepare import PreparedData
from tests.training.eligible_data import N, prepared

FORMS = [("attribute",), ("interval", "exclude"), ("attribute", "exclude", "candidates")]
SERVED = [
    ServingConfig(),
    ServingConfig(temperature=0.7, uniform=0.1),
    ServingConfig(top=4),
    ServingConfig(top=3, uniform=0.2),
]


def scored_world(*forms: str) -> tuple[PreparedData, np.ndarray, PolicyScorer, EncodedRows]:
    data, sets = prepared(150, *forms)
    torch.manual_seed(2)
    tower = TowerConfig(hidden_layer_sizes=(6,))
    config = PolicyConfig(
        embedding_dim=4, context_tower=tower, item_tower=tower, item_bias=True, temperature=0.3
    )
    policy = TwoTowerPolicy(config, data.context_encoding, data.item_encoding).eval()
    rows = next(iter(data.scan(4096)))
    return data, sets, PolicyScorer(policy, data.items), rows


def probabilities(
    scorer: PolicyScorer, rows: EncodedRows, sets: np.ndarray, serving: ServingConfig
) -> np.ndarray:
    """(n, N) of the served policy, from its definition."""
    from offtower.data.encoding import to_tensors

    with torch.no_grad():
        u = scorer.policy.embed_contexts(to_tensors(rows.context)).double()
    assert scorer.items.bias is not None
    score = u @ scorer.items.embedding.double().T / scorer.policy.temperature
    score = ((score + scorer.items.bias.double()) / serving.temperature).numpy()
    score = np.where(sets, score, -np.inf)
    if serving.top is not None:
        least = np.sort(score, axis=1)[:, -serving.top]
        score = np.where(score >= least[:, None], score, -np.inf)
    p = np.exp(score - score.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    even = sets / sets.sum(axis=1, keepdims=True)
    return np.asarray((1.0 - serving.uniform) * p + serving.uniform * even)


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("serving", SERVED)
def test_weights_and_expected_rewards_by_enumeration(
    forms: tuple[str, ...], serving: ServingConfig
) -> None:
    _, sets, scorer, rows = scored_world(*forms)
    q = np.random.default_rng(3).random((len(rows), N)).astype(np.float32)
    reward = CatalogueReward(DenseReward(torch.from_numpy(q)))
    scored = scorer.served_as(serving).score_models(rows, {"q": reward})
    p = probabilities(scorer, rows, sets, serving)
    every = np.arange(len(rows))
    assert rows.pscore is not None
    weight = p[every, rows.action] / rows.pscore
    np.testing.assert_allclose(scored.weighted.importance_weight, weight, rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(
        scored.predictions["q"].expected_reward, (p * q).sum(axis=1), rtol=2e-5
    )
    items = torch.arange(N).expand(len(rows), -1)
    found = scored.log_prob_at(items).exp().numpy()
    np.testing.assert_allclose(found, p, rtol=2e-5, atol=1e-9)
    taken = np.array([7, 2, 30])
    found = scored.log_prob_at(items[:3], taken).exp().numpy()
    np.testing.assert_allclose(found, p[taken], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("serving", SERVED)
def test_draws_are_eligible_and_have_their_probabilities(
    forms: tuple[str, ...], serving: ServingConfig
) -> None:
    """Pearson's statistic over 6 rows x 3,000 draws; its bound is exceeded in less than 1e-5."""
    from scipy.stats import chi2

    _, sets, scorer, rows = scored_world(*forms)
    some = rows.take(np.arange(6))
    draws, generator = 3_000, torch.Generator().manual_seed(4)
    q = CatalogueReward(DenseReward(torch.zeros(6, N)), at_draws=True)
    policy = scorer.served_as(serving)
    scored = policy.score_models(some, {"q": q}, draws=2, generator=generator)
    drawn, log_prob = policy.served.draw(
        scored.context_embedding, policy.items, draws, generator, scored.eligible_at(np.arange(6))
    )
    p = probabilities(scorer, some, sets[:6], serving)
    assert sets[:6][np.arange(6)[:, None], drawn.numpy()].all()
    np.testing.assert_allclose(
        log_prob.exp().numpy(), np.take_along_axis(p, drawn.numpy(), 1), rtol=3e-5
    )
    counts = np.stack([np.bincount(row, minlength=N) for row in drawn.numpy()])
    often = p * draws >= 5
    statistic = ((counts - p * draws)[often] ** 2 / (p * draws)[often]).sum()
    assert statistic < chi2.isf(1e-7, often.sum())


def test_a_uniform_policy_has_weight_one_over_eligible_items() -> None:
    # The log is uniform over eligible items, so a policy that serves these evenly has weight 1.
    for forms in FORMS:
        _, _, scorer, rows = scored_world(*forms)
        scored = scorer.served_as(ServingConfig(uniform=1.0)).score(rows)
        np.testing.assert_allclose(scored.importance_weight, 1.0, rtol=1e-6)


def test_rows_can_be_sent_to_another_process() -> None:
    _, _, scorer, rows = scored_world("attribute", "exclude")
    here = scorer.score(rows).importance_weight
    sent = pickle.loads(pickle.dumps(rows))
    np.testing.assert_array_equal(scorer.score(sent).importance_weight, here)
