"""The sampled terms against the exact operator, enumeration and finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops import (
    DenseReward,
    FactoredReward,
    PolicyTerms,
    policy_terms,
    sampled_policy_terms,
)
from offtower.ops import sampled_sums as sums_module

B, N, D, E = 7, 23, 5, 3
NAMES = ("log_prob", "log_normalizer", "expected_reward", "entropy")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed)) * scale


def world(scale: float = 1.0) -> dict[str, Any]:
    return {
        "u": normal(B, D, seed=1, scale=scale),
        "v": normal(N, D, seed=2),
        "b": normal(N, seed=3),
        "action": torch.arange(B) * 3 % N,
    }


def reward(kind: str) -> DenseReward | FactoredReward | None:
    if kind == "none":
        return None
    if kind == "dense":
        return DenseReward(normal(B, N, seed=4))
    link: Any = kind
    return FactoredReward(normal(B, E, seed=5), normal(N, E, seed=6), normal(N, seed=7), link)


def every_item_once(w: dict[str, Any], q: Any, **kwargs: Any) -> PolicyTerms:
    order = torch.randperm(N, generator=generator(9))
    return sampled_policy_terms(
        w["u"],
        w["v"][w["action"]],
        w["action"],
        w["v"][order],
        order,
        torch.full((N,), -math.log(N), dtype=torch.float64),
        action_bias=w["b"][w["action"]],
        sampled_bias=w["b"][order],
        reward_model=q,
        entropy=True,
        temperature=0.7,
        **kwargs,
    )


def each_row_its_own(w: dict[str, Any], q: Any, padding: int = 0, **kwargs: Any) -> PolicyTerms:
    order = torch.stack([torch.randperm(N, generator=generator(i)) for i in range(B)])
    log_q = torch.full((B, N), -math.log(N + padding), dtype=torch.float64)
    if padding:
        order = torch.cat([order, order[:, :padding]], dim=1)
        log_q = torch.cat([log_q, torch.full((B, padding), math.inf, dtype=torch.float64)], dim=1)
    return sampled_policy_terms(
        w["u"],
        w["v"][w["action"]],
        w["action"],
        w["v"],
        order,
        log_q,
        action_bias=w["b"][w["action"]],
        sampled_bias=w["b"],
        sample_index=order,
        reward_model=q,
        entropy=True,
        temperature=0.7,
        **kwargs,
    )


def exact(w: dict[str, Any], q: Any) -> PolicyTerms:
    return policy_terms(
        w["u"],
        w["v"],
        w["action"],
        item_bias=w["b"],
        reward_model=q,
        entropy=True,
        temperature=0.7,
        backend="reference",
    )


def assert_same(got: PolicyTerms, wanted: PolicyTerms, **tolerance: float) -> None:
    for name in (*NAMES, "action_reward"):
        one, two = getattr(got, name), getattr(wanted, name)
        assert (one is None) == (two is None), name
        if one is not None:
            torch.testing.assert_close(one, two, msg=name, **tolerance)


@pytest.mark.parametrize("kind", ["none", "dense", "identity", "sigmoid"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
def test_every_item_drawn_once_is_the_exact_operator(kind: str, scale: float) -> None:
    """m Q = 1 for every item, so the estimate is exact at every inverse temperature."""
    w, q = world(scale), reward(kind)
    assert_same(every_item_once(w, q), exact(w, q))
    assert_same(each_row_its_own(w, q), exact(w, q))
    assert_same(each_row_its_own(w, q, padding=4), exact(w, q))


@pytest.mark.parametrize("cells", [1, 60, 1 << 19])
def test_gradients_equal_those_of_the_exact_operator(
    cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through all outputs, into both embeddings and the bias, in chunks of any size."""
    monkeypatch.setattr(sums_module, "CPU_CHUNK", cells)
    weights = normal(4, B, seed=11)
    found = []
    for function in (every_item_once, each_row_its_own, exact):
        w, q = world(), reward("sigmoid")
        leaves = [w[name].requires_grad_() for name in ("u", "v", "b")]
        terms = function(w, q)
        loss = sum((weights[i] * getattr(terms, name)).sum() for i, name in enumerate(NAMES))
        found.append(torch.autograd.grad(loss, leaves))
    for part in found[:-1]:
        for got, wanted in zip(part, found[-1], strict=True):
            torch.testing.assert_close(got, wanted)


def few_draws(own: bool) -> dict[str, Any]:
    """Nine draws, among them hits on logged items, repeats and padding; some items exact."""
    w = world()
    m = 9
    shape = (B, m) if own else (m,)
    item = torch.randint(0, N, shape, generator=generator(21))
    item[..., 0] = 3  # the logged item of row 1
    log_q = -torch.rand(shape, dtype=torch.float64, generator=generator(22)) - 2.0
    log_q[..., -1] = math.inf
    exact_item = torch.stack([torch.randperm(N, generator=generator(i))[:3] for i in range(B)])
    exact_item[0, 0] = w["action"][0]
    exact_item[2, 1] = -1
    exact_item[3, 2] = item.reshape(-1)[4]
    return w | {
        "item": item,
        "log_q": log_q,
        "exact_item": exact_item,
        "own": own,
    }


def estimate(w: dict[str, Any], q: Any, leaves: list[Tensor]) -> PolicyTerms:
    u, va, v, ba, b = leaves
    # The embedding matrix has a row an item here, so items are their own index.
    return sampled_policy_terms(
        u,
        va,
        w["action"],
        v,
        w["item"],
        w["log_q"],
        temperature=0.7,
        action_bias=ba,
        sampled_bias=b,
        reward_model=q,
        entropy=True,
        sample_index=w["item"],
        exact_item=w["exact_item"],
        exact_index=w["exact_item"].clamp_min(0),
    )


def by_the_formula(w: dict[str, Any], q: Any) -> PolicyTerms:
    """The docstring's sums, in Python, one row at a time."""
    u, v, b, action = (w[name].numpy() for name in ("u", "v", "b", "action"))
    if isinstance(q, DenseReward):
        rewards = q.values.numpy()
    else:
        rewards = 1 / (1 + np.exp(-(q.context @ q.item.T + q.item_bias).numpy()))
    m = w["item"].shape[-1]
    rows = []
    for i in range(B):
        s = v @ u[i] / 0.7 + b
        weight = np.zeros(N)
        counted = {int(action[i]), *(int(a) for a in w["exact_item"][i] if a >= 0)}
        for a in counted:
            weight[a] = 1.0
        drawn = (w["item"][i] if w["own"] else w["item"]).tolist()
        log_q = (w["log_q"][i] if w["own"] else w["log_q"]).tolist()
        for a, log_p in zip(drawn, log_q, strict=True):
            if a not in counted:
                weight[a] += math.exp(-log_p) / m
        z = (weight * np.exp(s)).sum()
        p = weight * np.exp(s) / z
        rows.append(
            (
                s[action[i]] - math.log(z),
                math.log(z),
                (p * rewards[i]).sum(),
                rewards[i][action[i]],
                math.log(z) - (p * s).sum(),
            )
        )
    return PolicyTerms(
        *(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    )


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["dense", "sigmoid"])
def test_hits_repeats_padding_and_exact_items(own: bool, kind: str) -> None:
    w, q = few_draws(own), reward(kind)
    leaves = [w["u"], w["v"][w["action"]], w["v"], w["b"][w["action"]], w["b"]]
    assert_same(estimate(w, q, leaves), by_the_formula(w, q))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(own: bool, name: str) -> None:
    w, q = few_draws(own), reward("sigmoid")
    leaves = [w["u"], w["v"][w["action"]], w["v"], w["b"][w["action"]], w["b"]]
    inputs = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(lambda *x: getattr(estimate(w, q, list(x)), name), inputs)


@pytest.mark.parametrize("own", [False, True])
def test_a_row_whose_draws_are_all_masked(own: bool) -> None:
    """Only its logged item is left: probability 1, entropy 0, and gradients that are numbers."""
    w = world()
    item = torch.full((B, 4) if own else (4,), int(w["action"][2]))
    log_q = torch.zeros(item.shape, dtype=torch.float64)
    u, v = w["u"].requires_grad_(), w["v"].requires_grad_()
    terms = sampled_policy_terms(
        *(u, v[w["action"]], w["action"], v, item, log_q),
        sample_index=item,
        reward_model=reward("dense"),
        entropy=True,
    )
    assert terms.log_prob[2].item() == 0.0
    assert terms.entropy[2].item() == 0.0
    assert terms.expected_reward[2].item() == pytest.approx(terms.action_reward[2].item())
    total = sum(getattr(terms, name).sum() for name in NAMES)
    for gradient in torch.autograd.grad(total, (u, v)):
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smaller_dtypes_accumulate_in_float32(dtype: torch.dtype) -> None:
    w = {name: x.to(dtype) if x.is_floating_point() else x for name, x in world(30.0).items()}
    wide = {n: x.double() if x.is_floating_point() else x for n, x in w.items()}
    got, wanted = every_item_once(w, None), exact(wide, None)
    assert got.log_prob.dtype == torch.float32
    torch.testing.assert_close(got.log_prob.double(), wanted.log_prob, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(got.entropy.double(), wanted.entropy, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("draws", [8, 64])
def test_the_normalizer_is_unbiased_and_other_biases_are_of_order_one_over_m(draws: int) -> None:
    """Means over 8,000 independent draws of m. Z^: within 4.5 standard errors of Z in each of 7
    rows (false alarm below 1e-4). log Z^: the bias -V/2 of the docstring, to a third of it plus the
    same noise. V is computed from pi and Q, not from the draws."""
    w = world(0.7)
    q = FactoredReward(normal(B, E, seed=5), normal(N, E, seed=6))
    wanted = exact(w, q)
    log_pi = torch.log_softmax(w["u"] @ w["v"].T / 0.7 + w["b"], dim=1)
    proposal = torch.softmax(normal(N, seed=31, scale=0.3), dim=0)
    repeats = 8_000
    item = torch.multinomial(
        proposal.expand(repeats, -1), draws, replacement=True, generator=generator(32)
    )
    z, log_z, reward_mean = [], [], []
    # A thousand times the rows in one call, each with draws of its own.
    action = w["action"].repeat(1000)
    for some in item.split(1000):
        own = some.repeat_interleave(B, dim=0)
        terms = sampled_policy_terms(
            *(w["u"].repeat(1000, 1), w["v"][action], action, w["v"], own),
            proposal[own].log(),
            temperature=0.7,
            action_bias=w["b"][action],
            sampled_bias=w["b"],
            reward_model=FactoredReward(q.context.repeat(1000, 1), q.item),
            sample_index=own,
        )
        difference = terms.log_normalizer.view(-1, B) - wanted.log_normalizer
        z.append(torch.exp(difference))
        log_z.append(difference)
        reward_mean.append(terms.expected_reward.view(-1, B) - wanted.expected_reward)

    def mean(values: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = torch.cat(values)
        return x.mean(0), x.std(0) / math.sqrt(repeats)

    value, error = mean(z)
    assert bool(((value - 1).abs() < 4.5 * error).all())
    other = torch.ones(B, N, dtype=torch.bool)
    other[torch.arange(B), w["action"]] = False
    pi_a = log_pi.exp().gather(1, w["action"][:, None])[:, 0]
    second = (other * log_pi.exp().square() / proposal).sum(1)
    variance = (second - (1 - pi_a) ** 2) / draws
    value, error = mean(log_z)
    assert bool(((value + variance / 2).abs() < variance / 6 + 4.5 * error + variance**2).all())
    # The ratio estimate: biased by less than V times the spread of q, and not wildly more exact.
    value, error = mean(reward_mean)
    assert bool((value.abs() < 4 * variance + 4.5 * error).all())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"action_embedding": torch.zeros(B, D + 1)}, "action_embedding must have shape"),
    ({"action_embedding": torch.zeros(B, D).double()}, "give both one dtype"),
    ({"sampled_item": torch.zeros(0, dtype=torch.int64)}, "there are no draws"),
    ({"sampled_item": torch.zeros(4)}, "sampled_item must be int64"),
    ({"log_proposal": torch.zeros(3)}, r"log_proposal must be a float tensor of shape \(4,\)"),
    ({"log_proposal": torch.tensor([0, 0, math.nan, 0])}, r"log_proposal at \[2\] is nan"),
    ({"log_proposal": torch.tensor([0, -math.inf, 0, 0])}, r"at \[1\] is -inf: a proposal cannot"),
    ({"sampled_bias": torch.zeros(4)}, "belong together"),
    ({"sample_index": torch.tensor([0, 4, 0, 0])}, r"sample_index at \[1\] is 4, out of range"),
    ({"sampled_embedding": torch.zeros(5, D)}, "5 rows for 4 draws"),
    ({"exact_item": torch.zeros(B, 2, dtype=torch.int64)}, "exact_item and exact_index must both"),
    ({"temperature": 0.0}, "temperature must be a positive finite number"),
    (
        {"reward_model": DenseReward(torch.zeros(B, 3))},
        r"sampled_item at \[3\] is 3, out of range \[0, 3\)",
    ),
    (
        {"sampled_item": torch.zeros(B, 4, dtype=torch.int64), "log_proposal": torch.zeros(B, 4)},
        "draws of shape .B, m. need sample_index",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_invalid_arguments_raise(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "context_embedding": torch.zeros(B, D),
        "action_embedding": torch.zeros(B, D),
        "action": torch.zeros(B, dtype=torch.int64),
        "sampled_embedding": torch.zeros(4, D),
        "sampled_item": torch.arange(4),
        "log_proposal": torch.zeros(4),
    }
    sampled_policy_terms(**arguments)
    with pytest.raises(OperatorError, match=message):
        sampled_policy_terms(**(arguments | change))
