"""Masked items, NaN and infinite values, and actions that only the compiled operator can check."""

from __future__ import annotations

import pytest
import torch

from offtower import ops
from offtower.errors import OperatorError

INF = float("inf")


def operands(rows: int, items: int, dim: int = 4) -> tuple[torch.Tensor, ...]:
    make = torch.Generator().manual_seed(rows + items)
    return (
        torch.randn(rows, dim, dtype=torch.float64, generator=make),
        torch.randn(items, dim, dtype=torch.float64, generator=make),
        torch.full((rows,), items - 1),
    )


def test_masked_items_equal_absent_items(monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of 64 items; the first two hold nothing but masked items.
    monkeypatch.setattr("offtower.ops.reference.MAX_LOGITS", 1)
    u, v, action = operands(5, 200)
    reward = torch.rand(5, 200, dtype=torch.float64)
    bias = torch.zeros(200, dtype=torch.float64)
    bias[:130] = -INF
    got, want = [], []
    for into, first in ((got, 0), (want, 130)):
        x, y = u.clone().requires_grad_(), v[first:].clone().requires_grad_()
        terms = ops.policy_terms(
            x,
            y,
            action - first,
            item_bias=bias[first:],
            reward_model=ops.DenseReward(reward[:, first:]),
            entropy=True,
            backend="reference",
        )
        assert terms.entropy is not None and terms.expected_reward is not None
        values = [terms.log_prob, terms.log_normalizer, terms.expected_reward, terms.entropy]
        sum(value.sum() for value in values).backward()
        assert x.grad is not None and y.grad is not None
        assert not y.grad[: 130 - first].any()
        into += [*values, x.grad, y.grad[130 - first :]]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_masked_slice_merges() -> None:
    u, v, action = operands(3, 20)
    bias = torch.zeros(20, dtype=torch.float64)
    bias[:10] = -INF
    elsewhere = torch.full_like(action, -1)
    parts = [
        ops.partial_terms(u, v[:10], elsewhere, item_bias=bias[:10], entropy=True),
        ops.partial_terms(u, v[10:], action - 10, item_bias=bias[10:], entropy=True),
    ]
    whole = ops.policy_terms(u, v[10:], action - 10, entropy=True)
    for order in (parts, parts[::-1]):
        terms = ops.merge_partials(order).finish()
        torch.testing.assert_close(terms.log_normalizer, whole.log_normalizer)
        torch.testing.assert_close(terms.entropy, whole.entropy)


@pytest.mark.parametrize("isa", ops.available_instruction_sets())
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), INF])
@pytest.mark.parametrize("item", [0, 5, 511, 1999])
def test_native_core_propagates_nan_and_inf(
    isa: str, value: float, item: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFTOWER_CPU_ISA", isa)
    u, v, action = (t.float() if t.is_floating_point() else t for t in operands(70, 2000))
    v[item, 1] = value
    u[:, 1] = u[:, 1].abs()
    terms = ops.policy_terms(u, v, action, backend="cpu")
    assert not torch.isfinite(terms.log_normalizer).any()


@pytest.mark.parametrize("bad", [-1, 20])
def test_compiled_code_refuses_actions_out_of_range(bad: int) -> None:
    u, v, action = operands(4, 20)
    action[2] = bad
    compiled = torch.compile(
        lambda u, v, a: ops.policy_terms(u, v, a).log_prob, fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(OperatorError, match="row 2 is out of range"):
        compiled(u, v, action)
