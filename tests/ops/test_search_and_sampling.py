"""`top_k`, `sample_softmax`, invalid arguments, and memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offtower.errors import OperatorError
from offtower.ops import (
    DenseReward,
    FactoredReward,
    available_backends,
    policy_terms,
    reference,
    sample_softmax,
    top_k,
)


@given(
    rows=st.integers(1, 5),
    items=st.integers(1, 40),
    data=st.data(),
    seed=st.integers(0, 10_000),
    cells=st.sampled_from([1, 64, 10_000]),
)
@settings(max_examples=60)
def test_top_k_is_a_stable_sort(
    rows: int, items: int, data: st.DataObject, seed: int, cells: int
) -> None:
    """Small integers make many ties; the lowest item number must win each."""
    k = data.draw(st.integers(1, items))
    g = torch.Generator().manual_seed(seed)
    u = torch.randint(-1, 2, (rows, 2), generator=g).float()
    v = torch.randint(-1, 2, (items, 2), generator=g).float()
    b = torch.randint(-1, 2, (items,), generator=g).float()
    before = reference.MAX_LOGITS
    reference.MAX_LOGITS = cells
    try:
        scores, index = top_k(u, v, k, temperature=0.5, item_bias=b)
    finally:
        reference.MAX_LOGITS = before
    full = u @ v.T / 0.5 + b
    order = torch.argsort(full, dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(index, order)
    assert torch.equal(scores, full.gather(1, order))


@pytest.mark.parametrize("items", [1, 2, 50, 61])
def test_draws_have_the_softmax_distribution(items: int) -> None:
    """Chi-square at level 1e-6 with a fixed seed, over every item of every row."""
    g = torch.Generator().manual_seed(1)
    u, v = torch.randn(3, 4, generator=g), torch.randn(items, 4, generator=g)
    b = torch.randn(items, generator=g)
    draws = 40_000
    index, log_prob = sample_softmax(
        u, v, temperature=0.8, item_bias=b, generator=g, num_samples=draws
    )
    log_pi = torch.log_softmax(u @ v.T / 0.8 + b, 1)
    torch.testing.assert_close(log_prob, log_pi.gather(1, index), rtol=1e-5, atol=1e-5)
    for row in range(3):
        seen = torch.bincount(index[row], minlength=items).double()
        wanted = log_pi[row].double().exp() * draws
        large = wanted >= 5
        statistic = ((seen - wanted)[large] ** 2 / wanted[large]).sum()
        freedom = max(int(large.sum()) - 1, 1)
        # Wilson-Hilferty: the cube root of chi-square / k is near normal; 4.75 is level 1e-6.
        z = ((float(statistic) / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (
            2 / (9 * freedom)
        ) ** 0.5
        assert z < 4.75
        assert seen[~large].sum() <= 5 * max(1, int((~large).sum())) + 20


def test_draws_repeat_with_their_generator() -> None:
    u, v = torch.randn(4, 3), torch.randn(100, 3)
    one = sample_softmax(u, v, generator=torch.Generator().manual_seed(5), num_samples=7)
    two = sample_softmax(u, v, generator=torch.Generator().manual_seed(5), num_samples=7)
    assert torch.equal(one[0], two[0])


def test_a_peaked_policy_draws_its_peak_and_never_an_excluded_item() -> None:
    bias = torch.full((1000,), -1e4)
    bias[777] = 0.0
    index, log_prob = sample_softmax(
        torch.zeros(5, 2), torch.zeros(1000, 2), item_bias=bias, num_samples=20
    )
    assert (index == 777).all()
    torch.testing.assert_close(log_prob, torch.zeros_like(log_prob))


U, V, A = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 3])
CASES: list[tuple[dict[str, Any], str]] = [
    ({"action": torch.tensor([0, 4])}, "action 4 in row 1 is out of range: there are 4 items"),
    ({"action": torch.tensor([-1, 0])}, "action -1 in row 0 is out of range"),
    ({"action": torch.tensor([0.0, 1.0])}, "action must be int64"),
    ({"action": torch.tensor([0])}, r"action must have shape \(2,\)"),
    ({"temperature": 0.0}, "temperature must be a positive finite number, got 0.0"),
    ({"temperature": float("nan")}, "got nan"),
    ({"temperature": float("inf")}, "got inf"),
    ({"item_embedding": torch.zeros(0, 3)}, "no rows"),
    ({"item_embedding": torch.zeros(4, 2)}, "width 3 and item_embedding 2"),
    ({"item_embedding": torch.zeros(4, 3).double()}, "item_embedding is torch.float64"),
    ({"item_embedding": torch.zeros(4)}, r"item_embedding must have shape \(N, d\)"),
    ({"context_embedding": torch.zeros(2, 3).half()}, "float32, bfloat16 and float64"),
    ({"item_bias": torch.zeros(3)}, r"item_bias must have shape \(4,\)"),
    ({"reward_model": DenseReward(torch.zeros(2, 3))}, r"must have shape \(2, 4\)"),
    ({"reward_model": FactoredReward(torch.zeros(2, 1), torch.zeros(3, 1))}, "must have 4 rows"),
    (
        {"reward_model": FactoredReward(torch.zeros(2, 1), torch.zeros(4, 2))},
        "context has width 1 and item 2",
    ),
    (
        {"reward_model": FactoredReward(torch.zeros(2, 1), torch.zeros(4, 1), link="exp")},  # type: ignore[arg-type]
        "'identity' or 'sigmoid'",
    ),
    ({"reward_model": 3}, "DenseReward or a FactoredReward"),
    ({"backend": "cude"}, "backend must be one of"),
    ({"backend": "cuda"}, "backend 'cuda' is not available"),
]


@pytest.mark.parametrize(("change", "message"), CASES)
def test_invalid_arguments_raise(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"context_embedding": U, "item_embedding": V, "action": A}
    with pytest.raises(OperatorError, match=message):
        policy_terms(**{**arguments, **change})


@pytest.mark.parametrize("k", [0, 5])
def test_top_k_rejects_k_out_of_range(k: int) -> None:
    with pytest.raises(OperatorError, match=r"k must lie in \[1, 4\]"):
        top_k(U, V, k)


def test_no_array_of_rounds_by_items_is_held() -> None:
    """Forward and backward of all terms at B = 512, N = 300,000: the matrix alone is 586 MiB."""
    code = """
import resource, torch
from offtower.ops import FactoredReward, policy_terms, sample_softmax
torch.set_num_threads(2)
u = torch.randn(512, 8, requires_grad=True)
v = torch.randn(300_000, 8, requires_grad=True)
reward = FactoredReward(torch.randn(512, 8), torch.randn(300_000, 8), link="sigmoid")
a = torch.randint(0, 300_000, (512,))
policy_terms(u[:2], v[:100], a[:2] % 100, entropy=True).entropy.sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
t = policy_terms(u, v, a, reward_model=reward, entropy=True)
(t.log_prob + t.expected_reward + t.entropy).sum().backward()
sample_softmax(u.detach(), v.detach(), num_samples=2)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 250


@pytest.mark.parametrize("backend", available_backends())
def test_top_k_puts_nan_first_and_keeps_ties_in_order(backend: str) -> None:
    nan = float("nan")
    scores, index = top_k(
        torch.ones(1, 1),
        torch.tensor([[1.0], [nan], [3.0], [nan], [2.0]]),
        4,
        backend=backend,  # type: ignore[arg-type]
    )
    assert index.tolist() == [[1, 3, 2, 4]]
    assert scores[0, :2].isnan().all() and scores[0, 2:].tolist() == [3.0, 2.0]
