"""Slices of the sampled terms: merged, they are those of all draws, gradients included."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from offtower.ops import (
    FactoredReward,
    PartialTerms,
    PolicyTerms,
    merge_partials,
    sampled_policy_terms,
)
from offtower.ops.sampled_partial import sampled_partial_terms
from tests.sampling.test_sampled_terms import NAMES, B, N, normal, reward, world

DRAWS = 17
CUTS = {
    "whole": (0, N),
    "even": (0, 12, N),
    "uneven, one of them empty": (0, 1, 9, 9, 20, N),
    "each item by itself": tuple(range(N + 1)),
}


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Draws with repeated items and hits, their log Q, and each row's exact items."""
    generator = torch.Generator().manual_seed(3)
    item = torch.randint(N, (DRAWS,), generator=generator)
    log_q = torch.log(torch.rand(DRAWS, generator=generator, dtype=torch.float64) + 0.1)
    exact = torch.stack([torch.randperm(N, generator=generator)[:4] for _ in range(B)])
    exact[::2, 3] = -1
    exact[1, 0] = world()["action"][1]  # The logged item once more: it counts once.
    return item, log_q, exact


def sliced(w: dict[str, Any], q: FactoredReward | None, cuts: Any, exact: bool) -> PolicyTerms:
    item, log_q, listed = drawn()
    parts: list[PartialTerms] = []
    for start, stop in pairwise(cuts):

        def local(number: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return torch.where((number >= start) & (number < stop), number - start, -1)

        own = local(item)
        index = local(listed)
        parts.append(
            sampled_partial_terms(
                w["u"],
                w["v"][start:stop],
                w["b"][start:stop],
                local(w["action"]),
                local(w["action"]),
                own[own >= 0],
                log_q[own >= 0] + math.log(DRAWS),
                own[own >= 0],
                temperature=0.7,
                reward_model=None
                if q is None
                else FactoredReward(q.context, q.item[start:stop], q.item_bias[start:stop], q.link),  # type: ignore[index]
                entropy=True,
                exact_item=index if exact else None,
                exact_index=index if exact else None,
            )
        )
    return merge_partials(parts).finish()


def at_once(w: dict[str, Any], q: FactoredReward | None, exact: bool) -> PolicyTerms:
    item, log_q, listed = drawn()
    return sampled_policy_terms(
        w["u"],
        w["v"][w["action"]],
        w["action"],
        w["v"],
        item,
        log_q,
        temperature=0.7,
        action_bias=w["b"][w["action"]],
        sampled_bias=w["b"],
        sample_index=item,
        reward_model=q,
        entropy=True,
        exact_item=listed if exact else None,
        exact_index=listed.clamp_min(0) if exact else None,
    )


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["none", "identity", "sigmoid"])
@pytest.mark.parametrize("cuts", CUTS)
# Logits of hundreds: a slice's whole mass is nothing beside another's.
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_slices_merge_to_the_whole(cuts: str, kind: str, exact: bool, scale: float) -> None:
    q: Any = reward(kind)
    results = []
    for compute in (lambda w: sliced(w, q, CUTS[cuts], exact), lambda w: at_once(w, q, exact)):
        w = world(scale)
        inputs = [w[name].requires_grad_() for name in ("u", "v", "b")]
        terms = compute(w)
        found = [getattr(terms, name) for name in NAMES if getattr(terms, name) is not None]
        loss = sum((normal(B, seed=20 + i) * x).sum() for i, x in enumerate(found))
        results.append([*found, *torch.autograd.grad(loss, inputs)])
        if q is not None:
            results[-1].append(terms.action_reward)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
