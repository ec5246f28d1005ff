"""Operators do not depend on torch's default dtype and device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

from offtower.ops import (
    FactoredReward,
    available_backends,
    partial_terms,
    policy_terms,
    sample_softmax,
    sampled_policy_terms,
    top_k,
)
from offtower.ops.sampled_partial import sampled_partial_terms
from offtower.ops.square_sum import square_sum
from offtower.ops.types import Backend, PolicyTerms
from tests.torch_defaults import DEFAULTS, torch_default

ROWS, ITEMS, DIM, DRAWS = 70, 50, 8, 12
BACKENDS = [name for name in available_backends() if name != "cuda"]


class Operands:
    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        self.u, self.v = torch.randn(ROWS, DIM, generator=g), torch.randn(ITEMS, DIM, generator=g)
        self.bias = torch.randn(ITEMS, generator=g)
        self.action = torch.randint(0, ITEMS, (ROWS,), generator=g)
        self.reward = FactoredReward(
            torch.randn(ROWS, 3, generator=g), torch.randn(ITEMS, 3, generator=g), link="sigmoid"
        )
        self.shared = torch.randint(0, ITEMS, (DRAWS,), generator=g)
        self.own = torch.randint(0, ITEMS, (ROWS, DRAWS), generator=g)
        self.log_q = torch.full((ROWS, DRAWS), -math.log(ITEMS))

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        u, v, b = (x.clone().requires_grad_() for x in (self.u, self.v, self.bias))
        return u, v, b


def with_gradients(terms: PolicyTerms, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    values = [terms.log_prob, terms.log_normalizer, terms.expected_reward, terms.entropy]
    found = [value for value in values if value is not None]
    torch.stack([value.sum() for value in found]).sum().backward()
    return [*(x.detach() for x in found), *(cast(Tensor, leaf.grad) for leaf in leaves)]


def exact(x: Operands, backend: Backend) -> list[Tensor]:
    u, v, b = x.leaves()
    terms = policy_terms(
        *(u, v, x.action),
        temperature=0.7, item_bias=b, reward_model=x.reward, entropy=True, backend=backend,
    )  # fmt: skip
    return with_gradients(terms, (u, v, b))


def partial(x: Operands, backend: Backend) -> list[Tensor]:
    terms = partial_terms(
        *(x.u, x.v, x.action), reward_model=x.reward, entropy=True, backend=backend
    ).finish()
    return [value for value in vars(terms).values() if value is not None]


def search(x: Operands, backend: Backend) -> list[Tensor]:
    return list(top_k(x.u, x.v, 9, item_bias=x.bias, backend=backend))


def draws(x: Operands, backend: Backend) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return list(sample_softmax(x.u, x.v, item_bias=x.bias, generator=g, num_samples=3))


def squares(x: Operands, backend: Backend) -> list[Tensor]:
    return [square_sum(x.u, x.v, x.bias)]


def sampled(x: Operands, backend: Backend) -> list[Tensor]:
    u, v, b = x.leaves()
    terms = sampled_policy_terms(
        *(u, v[x.action], x.action, v[x.shared], x.shared, x.log_q[0]),
        action_bias=b[x.action], sampled_bias=b[x.shared], reward_model=x.reward, entropy=True,
    )  # fmt: skip
    return with_gradients(terms, (u, v, b))


def sampled_by_row(x: Operands, backend: Backend) -> list[Tensor]:
    u, v, b = x.leaves()
    items = torch.stack([x.action, (x.action + 1) % ITEMS], dim=1)
    terms = sampled_policy_terms(
        *(u, v[x.action], x.action, v, x.own, x.log_q),
        action_bias=b[x.action], sampled_bias=b, reward_model=x.reward, entropy=True,
        sample_index=x.own, exact_item=items, exact_index=items,
    )  # fmt: skip
    return with_gradients(terms, (u, v, b))


def sampled_slice(x: Operands, backend: Backend) -> list[Tensor]:
    u, v, b = x.leaves()
    terms = sampled_partial_terms(
        *(u, v, b, x.action, x.action, x.shared, x.log_q[0], x.shared),
        reward_model=x.reward, entropy=True,
    ).finish()  # fmt: skip
    return with_gradients(terms, (u, v, b))


OPERATORS = [exact, partial, search, draws, squares, sampled, sampled_by_row, sampled_slice]


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_do_not_depend_on_torch_defaults(
    operator: Callable[[Operands, Backend], list[Tensor]], backend: Backend, default: str
) -> None:
    """Same dtypes, device and bits as under float32 on the CPU."""
    wanted = operator(Operands(), backend)
    x = Operands()
    with torch_default(default):
        found = operator(x, backend)
    for got, value in zip(found, wanted, strict=True):
        assert got.dtype == value.dtype and got.device == value.device
        assert torch.equal(got, value)
