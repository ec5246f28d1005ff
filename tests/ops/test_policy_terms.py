"""`policy_terms` against float64 enumeration, a naive softmax, opcheck and gradcheck."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from offtower.ops import (
    DenseReward,
    FactoredReward,
    PolicyTerms,
    available_backends,
    available_instruction_sets,
    merge_partials,
    partial_terms,
    policy_terms,
    reference,
)
from offtower.ops.library import policy_arguments, policy_terms_forward, policy_terms_op
from offtower.ops.types import Operands, RewardOperands

KINDS = ("none", "dense", "identity", "sigmoid")


class Problem:
    """Random operands in float64, and the naive terms of them."""

    def __init__(
        self, rows: int, items: int, dim: int, kind: str, seed: int = 0, scale: float = 1.0
    ) -> None:
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=g)

        self.u, self.v, self.b = draw(rows, dim) * scale, draw(items, dim) * scale, draw(items)
        self.action = torch.randint(0, items, (rows,), generator=g)
        self.temperature = 0.7
        self.reward: DenseReward | FactoredReward | None = None
        if kind == "dense":
            self.reward = DenseReward(draw(rows, items))
        elif kind != "none":
            self.reward = FactoredReward(draw(rows, 3), draw(items, 3), draw(items), link=kind)  # type: ignore[arg-type]
        self.cotangents = [draw(rows) for _ in range(4)]

    def leaves(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [x.to(dtype).clone().requires_grad_() for x in (self.u, self.v, self.b)]

    def q(self) -> Tensor | None:
        if self.reward is None:
            return None
        if isinstance(self.reward, DenseReward):
            return self.reward.values
        assert self.reward.item_bias is not None
        q = self.reward.context @ self.reward.item.T + self.reward.item_bias
        return torch.sigmoid(q) if self.reward.link == "sigmoid" else q

    def naive(self, u: Tensor, v: Tensor, b: Tensor) -> list[Tensor]:
        """log_prob, log_normalizer, expected_reward, entropy from the whole matrix of logits."""
        s = u @ v.T / self.temperature + b
        lse = torch.logsumexp(s, 1)
        log_pi = s - lse[:, None]
        pi = log_pi.exp()
        q = self.q()
        return [
            log_pi[torch.arange(len(u)), self.action],
            lse,
            torch.zeros(len(u), dtype=u.dtype) if q is None else (pi * q.to(u.dtype)).sum(1),
            -(pi * log_pi).sum(1),
        ]

    def fused(self, u: Tensor, v: Tensor, b: Tensor, **options: Any) -> PolicyTerms:
        reward = self.reward
        if reward is not None and u.dtype != torch.float64:
            cast = {
                k: x.to(u.dtype) if isinstance(x, Tensor) else x for k, x in vars(reward).items()
            }
            reward = type(reward)(**cast)
        return policy_terms(
            u,
            v,
            self.action,
            temperature=self.temperature,
            item_bias=b,
            reward_model=reward,
            entropy=True,
            **options,
        )


def outputs(terms: PolicyTerms) -> list[Tensor | None]:
    return [terms.log_prob, terms.log_normalizer, terms.expected_reward, terms.entropy]


def loss(values: list[Tensor | None], cotangents: list[Tensor]) -> Tensor:
    """Every output with a random, row-dependent cotangent."""
    parts = [
        (v * c.to(v.dtype)).sum() for v, c in zip(values, cotangents, strict=True) if v is not None
    ]
    return torch.stack(parts).sum()


@pytest.fixture(params=[64, 1 << 22])
def cells(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Logits held at a time: few split the items into many chunks, many need one."""
    monkeypatch.setattr(reference, "MAX_LOGITS", request.param)
    return int(request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 3), (7, 1, 2), (5, 13, 4), (33, 200, 7)])
def test_values_and_gradients_equal_enumeration(
    kind: str, shape: tuple[int, int, int], cells: int
) -> None:
    p = Problem(*shape, kind)
    one, two = p.leaves(), p.leaves()
    fused, naive = outputs(p.fused(*one)), p.naive(*two)
    for got, wanted in zip(fused, naive, strict=True):
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    naive[2] = naive[2] if kind != "none" else naive[2].detach()
    loss(fused, p.cotangents).backward()
    loss(list(naive), p.cotangents).backward()
    for got, wanted in zip(one, two, strict=True):
        assert got.grad is not None and wanted.grad is not None
        torch.testing.assert_close(got.grad, wanted.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_action_reward_is_the_models(kind: str) -> None:
    p = Problem(6, 11, 3, kind)
    terms = p.fused(*p.leaves())
    q = p.q()
    if q is None:
        assert terms.action_reward is None and terms.expected_reward is None
        return
    assert terms.action_reward is not None
    assert not terms.action_reward.requires_grad
    torch.testing.assert_close(terms.action_reward, q[torch.arange(6), p.action])


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_only_requested_gradients_are_computed(needs: tuple[int, int, int]) -> None:
    p = Problem(4, 9, 3, "dense")
    leaves, naive = p.leaves(), p.leaves()
    for leaf, other, need in zip(leaves, naive, needs, strict=True):
        leaf.requires_grad_(bool(need))
        other.requires_grad_(bool(need))
    loss(outputs(p.fused(*leaves)), p.cotangents).backward()
    loss(list(p.naive(*naive)), p.cotangents).backward()
    for leaf, other, need in zip(leaves, naive, needs, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=1e-10)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("scale", [1e-3, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_uniform_and_peaked_policies_in_low_precision(
    dtype: torch.dtype, scale: float, cells: int
) -> None:
    """At scale 100 logits reach 1e4 and beyond. Inputs are rounded first, so that only the
    computation differs; float32 accumulation leaves errors near 1e-6 of the largest logit."""
    p = Problem(8, 300, 5, "sigmoid", scale=scale)
    p.u, p.v, p.b = (x.to(dtype).double() for x in (p.u, p.v, p.b))
    assert isinstance(p.reward, FactoredReward)
    p.reward = FactoredReward(
        *(x.to(dtype).double() for x in (p.reward.context, p.reward.item, p.reward.item_bias)),  # type: ignore[union-attr]
        link="sigmoid",
    )
    one, two = p.leaves(dtype), p.leaves()
    fused, naive = outputs(p.fused(*one)), p.naive(*two)
    size = float((p.u @ p.v.T / p.temperature + p.b).abs().max())
    for got, wanted in zip(fused, naive, strict=True):
        assert got is not None and got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=2e-6 * max(size, 1.0))
    if scale < 1:
        loss(fused, p.cotangents).backward()
        loss(list(naive), p.cotangents).backward()
        for got, wanted in zip(one, two, strict=True):
            assert got.grad is not None and wanted.grad is not None
            error = 1e-5 if dtype == torch.float32 else 1e-2
            size = float(wanted.grad.abs().max())
            torch.testing.assert_close(
                got.grad.double(), wanted.grad, rtol=error, atol=error * size
            )


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_huge_logits_do_not_overflow(logit: float) -> None:
    u = torch.tensor([[logit]])
    v = torch.tensor([[1.0], [1.0], [0.999]])
    terms = policy_terms(u, v, torch.tensor([0]), entropy=True)
    wanted = torch.log_softmax((u.double() @ v.double().T), 1)
    torch.testing.assert_close(terms.log_prob.double(), wanted[:, 0], rtol=0, atol=5e-3)
    assert torch.isfinite(terms.log_normalizer).all()
    assert terms.entropy is not None and (terms.entropy >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_gradcheck(kind: str) -> None:
    p = Problem(3, 5, 2, kind)
    u, v, b = p.leaves()
    x = Operands(u, v, p.action, 0.7, b, RewardOperands.of(p.reward))
    torch.library.opcheck(policy_terms_op, (True, "reference", *policy_arguments(x)))
    # Eager calls pass the dispatcher by, with the same bits.
    registered = policy_terms_op(True, "reference", *policy_arguments(x))
    eager = policy_terms_forward(x, True, "reference")
    for one, other in zip(registered, eager, strict=True):
        assert torch.equal(one, other)
    gradients = [torch.autograd.grad(one[0].sum(), (u, v, b)) for one in (registered, eager)]
    assert all(map(torch.equal, *gradients))

    def terms(u: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for x in outputs(p.fused(u, v, b)) if x is not None)

    assert torch.autograd.gradcheck(terms, p.leaves())


def test_torch_compile_does_not_break_the_graph() -> None:
    p = Problem(6, 20, 4, "sigmoid")

    def step(u: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return loss(outputs(p.fused(u, v, b)), p.cotangents)

    eager, compiled = p.leaves(torch.float32), p.leaves(torch.float32)
    step(*eager).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for one, two in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_autocast_keeps_float32() -> None:
    p = Problem(6, 20, 4, "none")
    leaves = p.leaves(torch.float32)
    plain = p.fused(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        inside = p.fused(*leaves)
    assert torch.equal(inside.log_prob, plain.log_prob)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(5,), (1, 2, 12), (4, 4)])
def test_partial_results_merge_to_the_whole(kind: str, cuts: tuple[int, ...]) -> None:
    p = Problem(6, 13, 3, kind)
    edges = [0, *sorted(set(cuts)), 13]
    parts = []
    for start, stop in itertools.pairwise(edges):
        reward = p.reward
        if isinstance(reward, DenseReward):
            reward = DenseReward(reward.values[:, start:stop])
        elif isinstance(reward, FactoredReward):
            assert reward.item_bias is not None
            reward = FactoredReward(
                reward.context, reward.item[start:stop], reward.item_bias[start:stop], reward.link
            )
        inside = (p.action >= start) & (p.action < stop)
        parts.append(
            partial_terms(
                p.u,
                p.v[start:stop],
                torch.where(inside, p.action - start, -1),
                temperature=p.temperature,
                item_bias=p.b[start:stop],
                reward_model=reward,
                entropy=True,
            )
        )
    whole = p.fused(p.u, p.v, p.b)
    for merged in (merge_partials(parts).finish(), merge_partials(parts[::-1]).finish()):
        for got, wanted in zip(outputs(merged), outputs(whole), strict=True):
            if wanted is not None:
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("isa", available_instruction_sets())
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (17, 513, 33), (130, 1500, 64)])
def test_native_core_equals_float64(
    isa: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every instruction set that this machine runs; errors within twice float32 torch's."""
    monkeypatch.setenv("OFFTOWER_CPU_ISA", isa)
    p = Problem(*shape, "none", scale=0.7)
    u, v, b = (x.float() for x in (p.u, p.v, p.b))
    terms = policy_terms(u, v, p.action, temperature=0.7, item_bias=b, backend="cpu")
    exact = torch.logsumexp(u.double() @ v.double().T / 0.7 + b.double(), 1)
    plain = torch.logsumexp(u @ v.T / 0.7 + b, 1)
    error = (terms.log_normalizer.double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + 1e-6
    bits = terms.log_normalizer.clone()
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        again = policy_terms(u, v, p.action, temperature=0.7, item_bias=b, backend="cpu")
        torch.set_num_threads(before)
        assert torch.equal(again.log_normalizer, bits)


@pytest.mark.skipif("cpu" not in available_backends(), reason="the native core is not built")
def test_native_forward_has_the_references_gradient() -> None:
    p = Problem(64, 1200, 8, "none")
    one, two = p.leaves(torch.float32), p.leaves(torch.float32)
    for leaves, backend in ((one, "cpu"), (two, "reference")):
        terms = policy_terms(
            leaves[0], leaves[1], p.action, item_bias=leaves[2], temperature=0.7, backend=backend
        )  # type: ignore[arg-type]
        terms.log_prob.mul(p.cotangents[0].float()).sum().backward()
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
