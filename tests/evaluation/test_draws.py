"""Draws from a policy in one pass: exact terms, exact distribution, unbiased expected rewards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from offtower import ops
from offtower.models.item_draws import rewards_at, terms_and_draws
from offtower.models.items import ItemEmbeddings


def world(rows: int, items: int, bias: bool, seed: int = 0) -> dict[str, object]:
    g = torch.Generator().manual_seed(seed)
    return {
        "context": torch.randn(rows, 3, generator=g),
        "items": ItemEmbeddings(
            torch.randn(items, 3, generator=g), torch.randn(items, generator=g) if bias else None
        ),
        "action": torch.randint(items, (rows,), generator=g),
        "reward": ops.FactoredReward(
            torch.randn(rows, 2, generator=g),
            torch.randn(items, 2, generator=g),
            torch.randn(items, generator=g),
            link="sigmoid",
        ),
    }


@pytest.mark.parametrize(("items", "size"), [(1, None), (7, 3), (7, 7), (13, 1), (200, None)])
@pytest.mark.parametrize("bias", [True, False])
def test_terms_are_those_of_the_operator(items: int, size: int | None, bias: bool) -> None:
    w = world(5, items, bias)
    terms, drawn = terms_and_draws(
        w["context"],
        w["items"],
        w["action"],
        draws=4,
        generator=torch.Generator().manual_seed(1),
        temperature=0.7,
        reward_model=w["reward"],
        slice_items=size,
    )
    expected = ops.policy_terms(
        w["context"],
        w["items"].embedding,
        w["action"],
        temperature=0.7,
        item_bias=w["items"].bias,
        reward_model=w["reward"],
    )
    for name in ("log_prob", "log_normalizer", "expected_reward", "action_reward"):
        torch.testing.assert_close(
            getattr(terms, name), getattr(expected, name), rtol=1e-5, atol=1e-5
        )
    assert drawn.shape == (5, 4) and drawn.min() >= 0 and drawn.max() < items


def test_items_come_with_the_policys_probability_and_rewards_are_unbiased() -> None:
    """Chi-square over 9 items in slices of 2, and the mean of q at draws: both at 1e-4."""
    w = world(2, 9, True)
    draws = 40_000
    _, drawn = terms_and_draws(
        w["context"],
        w["items"],
        w["action"],
        draws=draws,
        generator=torch.Generator().manual_seed(2),
        slice_items=2,
    )
    logit = w["context"] @ w["items"].embedding.T + w["items"].bias
    probability = torch.softmax(logit.double(), dim=1).numpy()
    for row in range(2):
        seen = np.bincount(drawn[row].numpy(), minlength=9)
        expected = draws * probability[row]
        assert np.sum((seen - expected) ** 2 / expected) < chi2.ppf(1 - 1e-4, 8)
    every = torch.arange(9).expand(2, -1)
    q = rewards_at(w["reward"], every).double().numpy()
    exact = (probability * q).sum(axis=1)
    spread = np.sqrt((probability * (q - exact[:, None]) ** 2).sum(axis=1) / draws)
    found = rewards_at(w["reward"], drawn).double().mean(dim=1).numpy()
    assert np.all(np.abs(found - exact) < 3.9 * spread)


def test_dense_rewards_at_draws_are_gathered() -> None:
    values = torch.arange(6.0).view(2, 3)
    item = torch.tensor([[2, 0], [1, 1]])
    assert rewards_at(ops.DenseReward(values), item).tolist() == [[2.0, 0.0], [4.0, 4.0]]


def test_an_impossible_item_is_never_drawn() -> None:
    w = world(3, 10, True)
    w["items"].bias[4] = float("-inf")
    _, drawn = terms_and_draws(
        w["context"],
        w["items"],
        torch.zeros(3, dtype=torch.int64),
        draws=2000,
        generator=torch.Generator().manual_seed(0),
        slice_items=5,
    )
    assert not (drawn == 4).any()
