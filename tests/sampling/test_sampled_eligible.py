"""Sampled terms restricted to eligible items, against the exact operator."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops import (
    Eligibility,
    FactoredReward,
    PolicyTerms,
    merge_partials,
    policy_terms,
    sampled_policy_terms,
)
from offtower.ops import sampled_sums as sums_module
from offtower.ops.sampled_partial import sampled_partial_terms
from offtower.sampling import ItemCounts, make_proposal
from tests.ops.eligible_sets import FORMS, draw_eligible
from tests.sampling.test_sampled_terms import (
    NAMES,
    B,
    N,
    assert_same,
    each_row_its_own,
    every_item_once,
    generator,
    normal,
    reward,
    world,
)


def sets(w: dict[str, Any], forms: str, seed: int = 5) -> tuple[Eligibility, Tensor]:
    return draw_eligible(w["action"], N, forms, generator(seed))


def exact(w: dict[str, Any], q: Any, eligible: Eligibility) -> PolicyTerms:
    return policy_terms(
        w["u"], w["v"], w["action"], item_bias=w["b"], reward_model=q, entropy=True,
        temperature=0.7, eligible=eligible,
    )  # fmt: skip


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("kind", ["none", "dense", "sigmoid"])
@pytest.mark.parametrize("cells", [1, 60, 1 << 19])
def test_every_item_drawn_once_is_the_exact_operator(
    forms: str, kind: str, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, and gradients through all of them, for draws of all rows and of each row's own."""
    monkeypatch.setattr(sums_module, "CPU_CHUNK", cells)
    q = reward(kind)
    eligible, _ = sets(world(), forms)
    found: list[list[Tensor]] = []
    for compute in (exact, every_item_once, each_row_its_own):
        w = world()
        leaves = [w[name].requires_grad_() for name in ("u", "v", "b")]
        terms = compute(w, q, eligible) if compute is exact else compute(w, q, eligible=eligible)
        outputs = [x for x in (getattr(terms, name) for name in NAMES) if x is not None]
        loss = sum((normal(B, seed=20 + i) * x).sum() for i, x in enumerate(outputs))
        found.append([*outputs, *torch.autograd.grad(loss, leaves)])  # type: ignore[arg-type]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one)


@pytest.mark.parametrize("forms", FORMS)
def test_exact_items_that_are_not_eligible_do_not_count(forms: str) -> None:
    """All items are counted exactly: the terms are those of the exact operator."""
    w, q = world(), reward("identity")
    eligible, _ = sets(w, forms)
    every = torch.arange(N).expand(B, N)
    terms = sampled_policy_terms(
        w["u"], w["v"][w["action"]], w["action"], w["v"], torch.tensor([3, 5]),
        torch.zeros(2, dtype=torch.float64), action_bias=w["b"][w["action"]], sampled_bias=w["b"],
        reward_model=q, entropy=True, temperature=0.7, sample_index=torch.tensor([3, 5]),
        exact_item=every, exact_index=every, eligible=eligible,
    )  # fmt: skip
    assert_same(terms, exact(w, q, eligible))


@pytest.mark.parametrize("forms", FORMS)
def test_slices_merge_to_the_whole(forms: str) -> None:
    """Draws with repeats and exact items, some of them not eligible."""
    w = world()
    eligible, _ = sets(w, forms)
    g = generator(3)
    item = torch.randint(N, (40,), generator=g)
    log_q = torch.log(torch.rand(40, generator=g, dtype=torch.float64) + 0.1)
    listed = torch.stack([torch.randperm(N, generator=g)[:4] for _ in range(B)])
    q = reward("sigmoid")
    assert isinstance(q, FactoredReward) and q.item_bias is not None
    whole = sampled_policy_terms(
        w["u"], w["v"][w["action"]], w["action"], w["v"], item, log_q,
        action_bias=w["b"][w["action"]], sampled_bias=w["b"], sample_index=item, reward_model=q,
        entropy=True, exact_item=listed, exact_index=listed, eligible=eligible,
    )  # fmt: skip
    parts = []
    for start, stop in pairwise((0, 1, 9, 9, 20, N)):

        def local(number: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return torch.where((number >= start) & (number < stop), number - start, -1)

        own, action = local(item), local(w["action"])
        parts.append(
            sampled_partial_terms(
                w["u"], w["v"][start:stop], w["b"][start:stop], action, action, own[own >= 0],
                log_q[own >= 0] + math.log(40), own[own >= 0],
                reward_model=FactoredReward(
                    q.context, q.item[start:stop], q.item_bias[start:stop], q.link
                ),
                entropy=True, exact_item=local(listed), exact_index=local(listed),
                eligible=eligible.slice_items(start, stop),
            )
        )  # fmt: skip
    assert_same(merge_partials(parts).finish(), whole)


@pytest.mark.parametrize("name", ["uniform", "frequency", "in_batch", "mixed"])
def test_normalizers_over_eligible_items_are_unbiased(name: str) -> None:
    """Mean of Z^ over 1,000 steps, within 4.5 standard errors for each row: a false alarm in 2e-5.

    The batch's rows are independent draws from the counts, as the in-batch expectation assumes;
    `in_batch` reaches logged items only, and so does its exact sum.
    """
    w = world(0.5)
    eligible, mask = sets(w, "bitmap excluded")
    rng = np.random.default_rng(0)
    counts = ItemCounts(np.arange(N - 3), rng.integers(1, 9, N - 3))
    share = counts.share(np.arange(N))
    proposal = make_proposal(name, N, num_samples=12, counts=counts)
    logits = (w["u"] @ w["v"].T + w["b"]).masked_fill(~mask, -math.inf)
    if name == "in_batch":
        seen = torch.from_numpy(share) > 0
        keep = seen | (torch.arange(N) == w["action"][:, None])
        logits = logits.masked_fill(~keep, -math.inf)
    found = []
    for seed in range(1_000):
        batch = torch.from_numpy(rng.choice(N, 30, p=share))
        draws = proposal.draw(seed, batch)
        log_proposal = draws.log_proposal
        if name in ("in_batch", "mixed"):
            # The row itself is one of the batch's 31: the others are draws.
            total = len(draws.item)
            expected = np.zeros(total)
            for source in proposal.sources:
                expected += source.expected_count(draws.item.numpy(), 31)
            log_proposal = torch.from_numpy(np.log(expected) - np.log(total))
        terms = sampled_policy_terms(
            w["u"], w["v"][w["action"]], w["action"], w["v"][draws.item], draws.item, log_proposal,
            action_bias=w["b"][w["action"]], sampled_bias=w["b"][draws.item], eligible=eligible,
        )  # fmt: skip
        found.append(terms.log_normalizer.exp())
    z = torch.stack(found)
    error = z.std(0) / len(z) ** 0.5
    wanted = torch.logsumexp(logits, 1).exp()
    assert bool(((z.mean(0) - wanted).abs() <= 4.5 * error + 1e-12).all())


def test_a_logged_item_that_is_not_eligible_is_refused() -> None:
    w = world()
    eligible, mask = sets(w, "bitmap")
    row = int((~mask).any(1).nonzero()[0])
    w["action"][row] = int((~mask[row]).nonzero()[0])
    with pytest.raises(OperatorError, match=f"of row {row} is not among the row's eligible items"):
        every_item_once(w, None, eligible=eligible)
