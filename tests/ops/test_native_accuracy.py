"""The native core against float64, for every instruction set that this machine runs.

The bound is twice the error of stable eager torch in the same dtype (max-shifted; entropy as
log Z - sum p (s - max)) from the same rounded inputs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offtower.ops import FactoredReward, available_instruction_sets, policy_terms, top_k
from tests.ops.cases import KINDS, Case, Variant, check_errors

pytestmark = pytest.mark.skipif(
    not available_instruction_sets(), reason="the native core is not built"
)

ISAS = available_instruction_sets()


SHAPES = [(1, 1, 1), (1, 300, 16), (3, 5, 2), (17, 513, 33), (130, 1500, 64), (70, 97, 130)]
SEEDS = range(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 6.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_within_twice_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: float, kind: str
) -> None:
    """Ragged shapes; near-uniform to so peaked that logits pass 1e4. One test has all instruction
    sets, which share the references."""
    for shape in SHAPES:
        for isa in ISAS:
            monkeypatch.setenv("OFFTOWER_CPU_ISA", isa)
            check_errors(shape, kind, dtype, scale, Case.native, seeds=SEEDS)


def test_a_million_items_in_float32(isa: str) -> None:
    """Moderate logits, N = 1e6: relative errors below 1e-6, in values and in gradients."""
    g = torch.Generator().manual_seed(3)
    rows, items, dim = 4, 1_000_000, 8
    u, v = torch.randn(rows, dim, generator=g), torch.randn(items, dim, generator=g)
    action = torch.randint(0, items, (rows,), generator=g)
    reward = FactoredReward(
        torch.randn(rows, 4, generator=g), torch.randn(items, 4, generator=g), link="sigmoid"
    )
    one = [x.clone().requires_grad_() for x in (u, v)]
    two = [x.double().requires_grad_() for x in (u, v)]
    results = []
    for (x, y), backend in ((one, "cpu"), (two, "reference")):
        model = reward
        if backend == "reference":
            model = FactoredReward(reward.context.double(), reward.item.double(), link="sigmoid")
        t = policy_terms(x, y, action, reward_model=model, entropy=True, backend=backend)  # type: ignore[arg-type]
        (t.log_prob.sum() + 3 * t.expected_reward.sum() + t.entropy.sum()).backward()  # type: ignore[union-attr]
        results.append([t.log_prob, t.log_normalizer, t.expected_reward, t.entropy])
    for got, wanted in zip(*results, strict=True):
        assert got is not None and wanted is not None
        assert ((got.double() - wanted).abs() / wanted.abs()).max() < 1e-6
    for a, b in zip(one, two, strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad.double() - b.grad).norm() < 1e-6 * b.grad.norm()


@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("items", [1, 2, 97, 2000])
def test_huge_logits(isa: str, logit: float, items: int) -> None:
    """All near +-1e4: only differences matter, and the largest item alone has mass."""
    u = torch.full((3, 1), logit)
    v = torch.linspace(0.9, 1.0, items)[:, None] if items > 1 else torch.ones(1, 1)
    action = torch.tensor([0, items - 1, items // 2])
    terms = policy_terms(u, v, action, entropy=True, backend="cpu")
    wanted = torch.log_softmax(u.double() @ v.double().T, 1).gather(1, action[:, None])[:, 0]
    plain = torch.log_softmax(u @ v.T, 1).gather(1, action[:, None])[:, 0]
    bar = 2 * (plain.double() - wanted).abs().max() + 1e-6
    assert (terms.log_prob.double() - wanted).abs().max() <= bar
    assert (terms.log_prob <= 0).all()
    assert terms.entropy is not None and (terms.entropy >= 0).all()


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("kind", ["none", "sigmoid"])
def test_errors_without_entropy(isa: str, scale: float, kind: str) -> None:
    """Its kernels find logits far above the reference max in another way."""
    for shape in SHAPES:
        variant = Variant(entropy=False)
        check_errors(shape, kind, torch.float32, scale, Case.native, seeds=(0, 1), variant=variant)


@pytest.mark.parametrize("step", [-95.0, -30.0, -4.0, 4.0, 6.8, 7.0, 30.0, 1e30])
def test_logits_that_rise_or_fall_from_item_to_item(isa: str, step: float) -> None:
    """At every distance from the reference max, within the slack, beyond it, and subnormal."""
    u = torch.tensor([[1.0], [0.5], [0.0]], requires_grad=True)
    v = (step * torch.arange(100.0))[:, None].requires_grad_()
    action = torch.tensor([99, 0, 50])
    terms = policy_terms(u, v, action, backend="cpu")
    (du, dv) = torch.autograd.grad(terms.log_prob.sum(), (u, v))
    x, y = (t.detach().double().requires_grad_() for t in (u, v))
    wanted = torch.log_softmax(x @ y.T, 1).gather(1, action[:, None])[:, 0]
    assert (terms.log_prob <= 0).all()
    torch.testing.assert_close(terms.log_prob.double(), wanted, rtol=1e-6, atol=1e-6)
    for got, exact in zip((du, dv), torch.autograd.grad(wanted.sum(), (x, y)), strict=True):
        torch.testing.assert_close(
            got.double(), exact, rtol=2e-6, atol=1e-7 * float(y.detach().abs().max())
        )


def test_subnormal_numbers_of_the_caller_stay(isa: str) -> None:
    """Kernels flush them to zero, on all threads; torch's operations on these threads do not."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        u, v = torch.ones(128, 1), -95.0 * torch.arange(3_000.0)[:, None]
        policy_terms(u, v, torch.zeros(128, dtype=torch.int64), backend="cpu")
        assert (torch.full((1 << 17,), 1e-38) * 0.1 > 0).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "sigmoid"])
def test_same_bits_on_every_run_and_with_any_number_of_threads(
    isa: str, dtype: torch.dtype, kind: str
) -> None:
    """20,000 items: segments forward and sixty-four backward; three blocks of rows and more."""
    case = Case(200, 20_000, 24, kind, dtype)
    before = torch.get_num_threads()
    first: dict[str, Tensor] | None = None
    try:
        for threads in (1, 3, 7, 3):
            torch.set_num_threads(threads)
            again = case.native()
            scores, index = top_k(case.u, case.v, 9, item_bias=case.b)
            again |= {"scores": scores, "index": index}
            first = first or again
            for name, value in again.items():
                assert torch.equal(value, first[name]), (name, threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_is_the_stable_sort_of_the_logits(isa: str, dtype: torch.dtype) -> None:
    """Small integers are exact in every dtype and make many ties; k up to all items."""
    g = torch.Generator().manual_seed(8)
    for rows, items in ((1, 1), (3, 7), (66, 700), (130, 200)):
        u = torch.randint(-2, 3, (rows, 5), generator=g).to(dtype)
        v = torch.randint(-2, 3, (items, 5), generator=g).to(dtype)
        b = torch.randint(-1, 2, (items,), generator=g).to(dtype)
        full = u.float() @ v.float().T / 0.5 + b.float()
        order = torch.argsort(full, dim=1, descending=True, stable=True)
        for k in {1, items // 2 + 1, items}:
            scores, index = top_k(u, v, k, temperature=0.5, item_bias=b, backend="cpu")
            assert torch.equal(index, order[:, :k])
            assert torch.equal(scores, full.gather(1, index))


def test_top_k_takes_nan_first_and_masked_items_last(isa: str) -> None:
    u = torch.ones(2, 1)
    v = torch.arange(200.0)[:, None]
    v[5] = v[150] = float("nan")
    bias = torch.zeros(200)
    bias[100:] = float("-inf")
    bias[150] = 0.0
    scores, index = top_k(u, v, 200, item_bias=bias, backend="cpu")
    assert index[0, :4].tolist() == [5, 150, 99, 98]
    assert torch.isnan(scores[:, :2]).all()
    assert (scores[:, -99:] == float("-inf")).all()
    assert index[0, -99:].tolist() == [i for i in range(100, 200) if i != 150]
    assert index[0].sort().values.tolist() == list(range(200))
