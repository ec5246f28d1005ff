"""Operators restricted to eligible items, against float64 with masked logits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from offtower.errors import OperatorError
from offtower.ops import (
    Eligibility,
    FactoredReward,
    ItemLists,
    available_instruction_sets,
    merge_partials,
    partial_terms,
    policy_terms,
    reference,
    sample_softmax,
    top_k,
)
from offtower.ops.library import policy_arguments, policy_terms_op
from offtower.ops.shards import shard_gradients
from offtower.ops.types import (
    Cotangents,
    ForwardStatistics,
    Operands,
    RewardOperands,
)
from tests.ops.cases import KINDS, Case, Variant, check_errors
from tests.ops.eligible_sets import FORMS, draw_eligible, item_lists, packed

SHAPES = [(1, 1, 1), (1, 300, 16), (7, 64, 3), (17, 513, 9)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forms", FORMS)
def test_reference_terms_and_gradients_are_those_of_masked_logits(forms: str, kind: str) -> None:
    for shape in SHAPES:
        case = Case(*shape, kind, torch.float64, variant=Variant(eligible=forms))
        found, wanted = case.native("reference"), case.torch(torch.float64)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@given(
    rows=st.integers(1, 9),
    items=st.integers(1, 200),
    forms=st.sampled_from(FORMS),
    density=st.sampled_from([0.02, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=40, deadline=None)
def test_slices_of_any_bounds_merge_to_the_whole(
    rows: int, items: int, forms: str, density: float, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, 3, dtype=dtype, generator=g)
    v = torch.randn(items, 3, dtype=dtype, generator=g)
    action = torch.randint(0, items, (rows,), generator=g)
    eligible, mask = draw_eligible(action, items, forms, g, density)
    reward = FactoredReward(u, v)
    leaves = u.clone().requires_grad_(), v.clone().requires_grad_()
    whole = policy_terms(*leaves, action, reward_model=reward, entropy=True, eligible=eligible)
    bounds = sorted({0, *torch.randint(0, items + 1, (2,), generator=g).tolist(), items})
    parts, slices = [], list(itertools.pairwise(bounds))
    for start, stop in slices:
        inside = (action >= start) & (action < stop)
        local = torch.where(inside, action - start, -1)
        model = FactoredReward(u, v[start:stop])
        sets = eligible.slice_items(start, stop)
        where = Eligibility(sets.group, sets.bitmap, sets.excluded, sets.candidates)
        row, item = torch.arange(rows).repeat_interleave(stop - start), torch.arange(stop - start)
        kept = where.contains(row, item.repeat(rows)).view(rows, -1)
        assert torch.equal(kept, mask[:, start:stop])
        parts.append(
            partial_terms(u, v[start:stop], local, reward_model=model, entropy=True, eligible=sets)
        )
    merged = merge_partials(parts).finish()
    for name in ("log_prob", "log_normalizer", "expected_reward", "action_reward", "entropy"):
        torch.testing.assert_close(
            getattr(merged, name), getattr(whole, name).detach(), rtol=1e-5, atol=1e-5
        )
    cotangent = torch.randn(3, rows, dtype=dtype, generator=g)
    assert whole.expected_reward is not None and whole.entropy is not None
    terms = (whole.log_prob, whole.expected_reward, whole.entropy)
    sum((c * t).sum() for c, t in zip(cotangent, terms, strict=True)).backward()  # type: ignore[union-attr]
    sums = merge_partials(parts).sums
    forward = ForwardStatistics(
        sums.top, sums.total, whole.expected_reward.detach(), whole.entropy.detach()
    )
    cotangents = Cotangents(cotangent[0], None, cotangent[1], cotangent[2])
    du, dv = torch.zeros_like(u), []
    for start, stop in slices:
        inside = (action >= start) & (action < stop)
        found = shard_gradients(
            u, v[start:stop], torch.where(inside, action - start, -1), forward, cotangents,
            reward_model=FactoredReward(u, v[start:stop]),
            eligible=eligible.slice_items(start, stop),
        )  # fmt: skip
        assert found.context is not None and found.item is not None
        du += found.context
        dv.append(found.item)
    torch.testing.assert_close(du, leaves[0].grad, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(torch.cat(dv), leaves[1].grad, rtol=1e-4, atol=2e-5)


@given(
    rows=st.integers(1, 6),
    items=st.integers(1, 150),
    forms=st.sampled_from(FORMS),
    seed=st.integers(0, 10_000),
    cells=st.sampled_from([1, 64, 10_000]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_top_k_is_a_stable_sort_of_the_eligible_items(
    rows: int, items: int, forms: str, seed: int, cells: int, data: st.DataObject
) -> None:
    """Small integers make many ties, a bias of -inf makes ties with what is not eligible."""
    k = data.draw(st.integers(1, items))
    g = torch.Generator().manual_seed(seed)
    u = torch.randint(-1, 2, (rows, 2), generator=g).float()
    v = torch.randint(-1, 2, (items, 2), generator=g).float()
    b = torch.randint(-1, 2, (items,), generator=g).float()
    b[torch.rand(items, generator=g) < 0.1] = float("-inf")
    action = torch.randint(0, items, (rows,), generator=g)
    eligible, mask = draw_eligible(action, items, forms, g, 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "MAX_LOGITS", cells)
        scores, index = top_k(u, v, k, item_bias=b, eligible=eligible)
    full = u @ v.T + b
    for row in range(rows):
        own = mask[row].nonzero()[:, 0]
        order = own[torch.argsort(full[row, own], descending=True, stable=True)][:k]
        assert index[row].tolist() == [*order.tolist(), *[-1] * (k - len(order))]
        assert torch.equal(scores[row, : len(order)], full[row, order])
        assert bool((scores[row, len(order) :] == float("-inf")).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forms", ["bitmap", "excluded", "candidates"])
def test_one_eligible_item_has_probability_one(forms: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    u = torch.randn(5, 8, generator=g, dtype=dtype) * 9
    v = torch.randn(99, 8, generator=g, dtype=dtype)
    action = torch.tensor([0, 98, 63, 64, 17])
    only = torch.zeros(5, 99, dtype=torch.bool)
    only[torch.arange(5), action] = True
    eligible = {
        "bitmap": Eligibility(torch.arange(5, dtype=torch.int32), packed(only)),
        "excluded": Eligibility(excluded=item_lists(~only)),
        "candidates": Eligibility(candidates=item_lists(only)),
    }[forms]
    terms = policy_terms(u, v, action, entropy=True, eligible=eligible, temperature=0.3)
    assert terms.log_prob.tolist() == [0.0] * 5
    assert terms.entropy is not None and terms.entropy.tolist() == [0.0] * 5
    assert eligible.count(99).tolist() == [1] * 5


def test_counts_and_rows_follow_the_mask() -> None:
    g = torch.Generator().manual_seed(3)
    for forms in FORMS:
        for items in (1, 64, 130):
            action = torch.randint(0, items, (11,), generator=g)
            eligible, mask = draw_eligible(action, items, forms, g)
            assert eligible.count(items).tolist() == mask.sum(1).tolist()
            row = torch.tensor([10, 0, 3, 3])
            assert eligible.take(row).count(items).tolist() == mask[row].sum(1).tolist()


def test_compact_candidates_have_the_values_and_gradients_of_the_catalogue() -> None:
    case = Case(9, 300, 5, "none", torch.float64, variant=Variant(eligible="candidates"))
    assert case.eligible is not None and case.eligible.candidates is not None
    distinct, lists = case.eligible.candidates.compact()
    position, there = lists.find(torch.arange(9), torch.searchsorted(distinct, case.action))
    assert bool(there.all())
    u, v = case.u.clone().requires_grad_(), case.v[distinct].clone().requires_grad_()
    terms = policy_terms(
        u, v, lists.items[position], temperature=0.7, item_bias=case.b[distinct],
        eligible=Eligibility(candidates=lists),
    )  # fmt: skip
    (
        terms.log_prob * case.cotangents[0] + terms.log_normalizer * case.cotangents[1]
    ).sum().backward()
    wanted = Case(
        9, 300, 5, "none", torch.float64, variant=Variant(entropy=False, eligible="candidates")
    ).torch(torch.float64)
    torch.testing.assert_close(terms.log_prob.detach(), wanted["log_prob"])
    torch.testing.assert_close(u.grad, wanted["du"])
    torch.testing.assert_close(v.grad, wanted["dv"][distinct])


def test_compile_keeps_one_graph() -> None:
    case = Case(4, 70, 5, "none", torch.float32, variant=Variant(eligible="bitmap excluded"))
    x = Operands(
        case.u.requires_grad_(), case.v.requires_grad_(), case.action, 0.7, case.b,
        RewardOperands(dense=torch.randn(4, 70)), case.eligible,
    )  # fmt: skip
    torch.library.opcheck(policy_terms_op, (True, "auto", *policy_arguments(x)))
    lists = Eligibility(candidates=item_lists(case.mask))
    x = replace(x, eligible=lists)
    torch.library.opcheck(policy_terms_op, (True, "auto", *policy_arguments(x)))


U, V, A = torch.ones(2, 3), torch.ones(70, 3), torch.tensor([0, 69])
GROUP, BITMAP = torch.tensor([0, 0], dtype=torch.int32), packed(torch.ones(1, 70, dtype=torch.bool))


def lists_of(offsets: list[int], items: list[int]) -> ItemLists:
    return ItemLists(torch.tensor(offsets), torch.tensor(items, dtype=torch.int64))


@pytest.mark.parametrize(
    ("eligible", "message"),
    [
        (Eligibility(group=GROUP), "given together"),
        (Eligibility(GROUP.long(), BITMAP), r"group must be int32 of shape \(2,\)"),
        (Eligibility(GROUP, BITMAP[:, :1]), r"bitmap must be int64 of shape \(G, 2\)"),
        (Eligibility(GROUP + 1, BITMAP), "group of row 0 is 1, but eligible.bitmap has 1 rows"),
        (Eligibility(GROUP, BITMAP | -1), "bits beyond the 70 items"),
        (Eligibility(excluded=lists_of([0, 1], [3])), r"offsets must be int64 of shape \(3,\)"),
        (Eligibility(excluded=lists_of([0, 1, 3], [3, 4])), "offsets must rise from 0 to 2"),
        (Eligibility(candidates=lists_of([0, 1, 2], [0, 70])), "row 1: item 70 is out of range"),
        (Eligibility(candidates=lists_of([0, 2, 3], [4, 4, 69])), "row 0: item 4 is not above"),
        (
            Eligibility(candidates=lists_of([0, 1, 2], [3, 69])),
            "action 0 of row 0 is not among the row's eligible items",
        ),
        (Eligibility(excluded=lists_of([0, 0, 1], [69])), "action 69 of row 1 is not among"),
        (Eligibility(candidates=lists_of([0, 1, 1], [0])), "row 1 has no eligible item"),
        (Eligibility(GROUP, BITMAP & 0), "row 0 has no eligible item"),
        (
            Eligibility(excluded=lists_of([0, 0, 70], list(range(70)))),
            "row 1 has no eligible item",
        ),
        (
            Eligibility(GROUP, BITMAP, candidates=lists_of([0, 1, 1], [0])),
            "row 1 has no eligible item",
        ),
    ],
)
def test_wrong_sets_are_refused(eligible: Eligibility, message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        policy_terms(U, V, A, eligible=eligible)


def test_searches_of_empty_sets_are_refused() -> None:
    for eligible in (
        Eligibility(candidates=lists_of([0, 1, 1], [0])),
        Eligibility(excluded=lists_of([0, 0, 70], list(range(70)))),
    ):
        with pytest.raises(OperatorError, match="row 1 has no eligible item"):
            top_k(U, V, 2, eligible=eligible)


@pytest.mark.parametrize("forms", FORMS)
def test_draws_have_the_softmax_distribution_of_the_eligible_items(forms: str) -> None:
    """Chi-square over every item of every row; a false alarm at 1e-5 a row, with a fixed seed."""
    g = torch.Generator().manual_seed(2)
    rows, items, draws = 4, 130, 20_000
    u, v = torch.randn(rows, 4, generator=g), torch.randn(items, 4, generator=g)
    action = torch.randint(0, items, (rows,), generator=g)
    eligible, mask = draw_eligible(action, items, forms, g)
    index, log_prob = sample_softmax(
        u, v, temperature=0.8, eligible=eligible, generator=g, num_samples=draws
    )
    logits = (u.double() @ v.double().T / 0.8).masked_fill(~mask, float("-inf"))
    log_pi = torch.log_softmax(logits, 1)
    torch.testing.assert_close(log_prob.double(), log_pi.gather(1, index), rtol=1e-5, atol=1e-5)
    for row in range(rows):
        seen = torch.bincount(index[row], minlength=items).double()
        assert not bool(seen[~mask[row]].any())
        wanted = log_pi[row].exp() * draws
        large = wanted >= 5
        seen = torch.cat([seen[large], seen[~large].sum()[None]])
        wanted = torch.cat([wanted[large], wanted[~large].sum()[None]])
        used = wanted > 0
        statistic = float(((seen - wanted)[used].square() / wanted[used]).sum())
        assert statistic <= stats.chi2.isf(1e-5, max(1, int(used.sum()) - 1))


def test_draws_from_an_empty_set_are_refused() -> None:
    for eligible in (
        Eligibility(candidates=lists_of([0, 1, 1], [0])),
        Eligibility(excluded=lists_of([0, 0, 70], list(range(70)))),
    ):
        with pytest.raises(OperatorError, match="row 1 has no eligible item"):
            sample_softmax(U, V, eligible=eligible)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forms", FORMS)
def test_errors_of_the_native_core_are_within_twice_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, forms: str, kind: str, dtype: torch.dtype
) -> None:
    """Ragged shapes, near-uniform to peaked; every instruction set, with shared references."""
    for shape, scale in (((1, 1, 1), 1.0), ((17, 513, 33), 1e-3), ((130, 300, 20), 6.0)):
        variant = Variant(entropy=scale > 1, eligible=forms)
        for isa in available_instruction_sets():
            monkeypatch.setenv("OFFTOWER_CPU_ISA", isa)
            check_errors(shape, kind, dtype, scale, Case.native, seeds=range(2), variant=variant)


@pytest.mark.parametrize("forms", ["bitmap excluded", "candidates"])
def test_bits_do_not_depend_on_the_threads(isa: str, forms: str) -> None:
    """Many blocks, tiles and segments, of which some have no eligible item."""
    case = Case(140, 9000, 16, "sigmoid", torch.float32, variant=Variant(eligible=forms))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            score, index = top_k(case.u, case.v, 9, item_bias=case.b, eligible=case.eligible)
            results.append([*case.native("auto").values(), score, index])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ranges_without_eligible_items_are_skipped_exactly() -> None:
    """Groups with ranges of their own: most blocks and tiles have no eligible item."""
    g = torch.Generator().manual_seed(0)
    rows, items, groups = 200, 5000, 8
    u, v = torch.randn(rows, 8, generator=g), torch.randn(items, 8, generator=g)
    group = torch.randint(0, groups, (rows,), generator=g, dtype=torch.int32)
    own = torch.arange(items) * groups // items == torch.arange(groups)[:, None]
    action = torch.stack([own[i].nonzero()[:, 0][i % 7] for i in group.tolist()])
    eligible = Eligibility(group, packed(own))
    found = []
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (u, v)]
        terms = policy_terms(
            leaves[0],
            leaves[1],
            action,
            entropy=True,
            eligible=eligible,
            backend=backend,  # type: ignore[arg-type]
        )
        assert terms.entropy is not None
        (terms.log_prob + terms.entropy).sum().backward()
        found.append([terms.log_prob, terms.entropy, leaves[0].grad, leaves[1].grad])
    for mine, wanted in zip(*found, strict=True):
        assert mine is not None and wanted is not None
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=2e-5)
