"""Draws from the softmax: random numbers, distributions, determinism, masks and extreme logits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops import (
    Eligibility,
    ItemLists,
    available_backends,
    available_instruction_sets,
    policy_terms,
    reference,
    sample_softmax,
)
from offtower.ops.philox import philox
from offtower.ops.softmax_sampling import draw_softmax
from offtower.ops.tiled_draws import tile_items
from offtower.ops.types import Backend
from tests.ops.eligible_sets import draw_eligible

BACKENDS = [name for name in available_backends() if name != "cuda"]
LEVEL = 1e-6
"""False alarms of one chi-square test, with fixed seeds."""

VECTORS = [
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
"""Known answers of Random123 (kat_vectors, philox4x32 with 10 rounds)."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def log_softmax(u: Tensor, v: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.log_softmax(u.double() @ v.double().T / temperature, 1)


def check_counts(seen: Tensor, probability: Tensor) -> None:
    """Chi-square of counts (n,) against probabilities (n,), rare categories together."""
    wanted = probability * seen.sum()
    assert not bool(seen[wanted == 0].any())
    large = wanted >= 5
    seen = torch.cat([seen[large].double(), seen[~large].sum()[None].double()])
    wanted = torch.cat([wanted[large], wanted[~large].sum()[None]])
    used = wanted > 0
    statistic = float(((seen - wanted)[used].square() / wanted[used]).sum())
    assert statistic <= stats.chi2.isf(LEVEL, max(1, int(used.sum()) - 1))


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_random_words_are_those_of_philox(counter: list[int], key: int, words: list[int]) -> None:
    found = philox(tuple(torch.tensor([c]) for c in counter), key)  # type: ignore[arg-type]
    assert [int(word) for word in found] == words
    if available_instruction_sets():
        from offtower.ops import _cpu

        assert list(_cpu.philox(counter, key)) == words


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("scale", [0.5, 4.0])
@pytest.mark.parametrize("forms", [None, "bitmap", "bitmap excluded", "candidates"])
def test_the_native_draws_are_those_of_the_reference(
    isa: str, forms: str | None, scale: float, replacement: bool
) -> None:
    """Several tiles, blocks with empty lanes, and rows that share a tile. A draw differs where the
    logits' rounding moves an item's edge across a uniform number, with probability below 1e-5: that
    three of the 70 rows do so has one below 1e-7."""
    g = seeded(3)
    rows, items, draws = 70, 2000, 9
    assert tile_items(items) < items
    u, v = scale * torch.randn(rows, 5, generator=g), torch.randn(items, 5, generator=g)
    bias = torch.randn(items, generator=g)
    eligible = None
    if forms is not None:
        action = torch.randint(0, items, (rows,), generator=g)
        eligible, _ = draw_eligible(action, items, forms, g)
    options: dict[str, Any] = {
        "temperature": 0.8,
        "item_bias": bias,
        "eligible": eligible,
        "num_samples": draws,
        "replacement": replacement,
    }
    one = draw_softmax(u, v, **options, backend="cpu", generator=seeded(1))
    two = draw_softmax(u, v, **options, backend="reference", generator=seeded(1))
    same = one.item == two.item
    assert int((~same).any(1).sum()) <= 2
    torch.testing.assert_close(one.log_prob[same], two.log_prob[same], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.log_normalizer, two.log_normalizer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_draws_over_several_tiles_have_the_softmax_distribution(
    backend: Backend, dtype: torch.dtype
) -> None:
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the native core takes no float64")
    items, draws = 1000, 20_000
    u, v = normal(3, 4, seed=1).to(dtype), normal(items, 4, seed=2).to(dtype)
    item, log_prob = sample_softmax(
        u, v, temperature=0.7, generator=seeded(4), num_samples=draws, backend=backend
    )
    log_pi = log_softmax(u, v, 0.7)
    torch.testing.assert_close(log_prob.double(), log_pi.gather(1, item), rtol=1e-5, atol=2e-5)
    for row in range(len(u)):
        check_counts(torch.bincount(item[row], minlength=items), log_pi[row].exp())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("listed", [False, True])
def test_draws_without_replacement_are_plackett_luce(backend: Backend, listed: bool) -> None:
    """All 60 ordered triples of 5 items, enumerated; most rows repeat an item at first."""
    rows, items = 20_000, 5
    u, v = torch.tensor([[1.5]]), torch.tensor([[1.2], [-1.0], [0.3], [0.9], [-0.4]])
    eligible = None
    if listed:
        offsets = torch.arange(rows + 1) * items
        eligible = Eligibility(candidates=ItemLists(offsets, torch.arange(items).repeat(rows)))
    item, log_prob = sample_softmax(
        u.expand(rows, 1).contiguous(),
        v,
        eligible=eligible,
        generator=seeded(5),
        num_samples=3,
        replacement=False,
        backend=backend,
    )
    p = log_softmax(u, v)[0].exp()
    torch.testing.assert_close(log_prob.double(), p.log()[item], rtol=1e-5, atol=1e-5)
    triples = list(itertools.permutations(range(items), 3))
    wanted = torch.tensor(
        [float(p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b])) for a, b, c in triples],
        dtype=torch.float64,
    )
    number = {triple: i for i, triple in enumerate(triples)}
    seen = torch.bincount(
        torch.tensor([number[a, b, c] for a, b, c in item.tolist()]), minlength=len(triples)
    )
    check_counts(seen, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_first_items_leave_is_drawn_exactly(backend: Backend) -> None:
    """Item 900 has all but e^-1000 of the mass, item 30 all but e^-500 of the rest; the third draw
    is among 998 items of probability e^-1000, which underflows."""
    rows, items = 8_000, 1000
    bias = torch.zeros(items)
    bias[900], bias[30] = 1000.0, 500.0
    bias[::2] -= 1.0
    bias[30] += 1.0
    bias[900] += 1.0
    item, log_prob = sample_softmax(
        torch.zeros(rows, 1),
        torch.zeros(items, 1),
        item_bias=bias,
        generator=seeded(6),
        num_samples=3,
        replacement=False,
        backend=backend,
    )
    assert (item[:, 0] == 900).all() and (item[:, 1] == 30).all()
    torch.testing.assert_close(log_prob[:, 1], torch.full((rows,), -500.0))
    rest = bias.double()
    rest[[900, 30]] = float("-inf")
    check_counts(torch.bincount(item[:, 2], minlength=items), torch.softmax(rest, 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_end_where_their_items_do(backend: Backend) -> None:
    """Three eligible items, one of them with a bias of -inf: two draws, then -1 and -inf."""
    bias = torch.zeros(300)
    bias[299] = float("-inf")
    excluded = torch.cat([torch.arange(5), torch.arange(7, 299)])
    for eligible in (
        Eligibility(excluded=ItemLists(torch.tensor([0, len(excluded)]), excluded)),
        Eligibility(candidates=ItemLists(torch.tensor([0, 3]), torch.tensor([5, 6, 299]))),
    ):
        item, log_prob = sample_softmax(
            torch.zeros(1, 2),
            torch.zeros(300, 2),
            item_bias=bias,
            eligible=eligible,
            num_samples=5,
            replacement=False,
            backend=backend,
        )
        assert sorted(item[0, :2].tolist()) == [5, 6] and item[0, 2:].tolist() == [-1] * 3
        torch.testing.assert_close(log_prob[0, :2].exp(), torch.full((2,), 0.5))
        assert (log_prob[0, 2:] == float("-inf")).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_drawing_all_items_gives_a_permutation(backend: Backend) -> None:
    u, v = 5 * normal(3, 2, seed=1), normal(400, 2, seed=2)
    item, _ = sample_softmax(u, v, num_samples=400, replacement=False, backend=backend)
    assert torch.equal(item.sort(1).values, torch.arange(400).expand(3, -1))


def test_draws_do_not_depend_on_threads(isa: str) -> None:
    u, v = normal(300, 20, seed=1), normal(30_000, 20, seed=2)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for replacement in (True, False):
                found.append(
                    draw_softmax(u, v, generator=seeded(1), num_samples=6, replacement=replacement)
                )
    finally:
        torch.set_num_threads(before)
    for one, two in ((found[0], found[2]), (found[1], found[3])):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_reference_does_not_depend_on_its_blocks_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    u, v = normal(20, 3, seed=1), normal(700, 3, seed=2)
    options: dict[str, Any] = {"num_samples": 5, "replacement": False, "backend": "reference"}
    whole, _ = sample_softmax(u, v, generator=seeded(2), **options)
    monkeypatch.setattr(reference, "MAX_LOGITS", 1)
    parts, _ = sample_softmax(u, v, generator=seeded(2), **options)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_grouped_by_their_items_keep_their_random_numbers(backend: Backend) -> None:
    """Two equal groups in turn draw what one group draws."""
    u, v = normal(40, 3, seed=1), normal(500, 3, seed=2)
    words = -(-500 // 64)
    bitmap = torch.full((2, words), -1)
    bitmap[:, -1] = (1 << 500 % 64) - 1
    found = [
        sample_softmax(
            u,
            v,
            eligible=Eligibility(group, bitmap),
            generator=seeded(3),
            num_samples=4,
            backend=backend,
        )[0]
        for group in (torch.arange(40).int() % 2, torch.zeros(40, dtype=torch.int32))
    ]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e30, 3e4])
def test_huge_logits_draw_the_largest(backend: Backend, size: float) -> None:
    v = torch.zeros(500, 1)
    v[321] = 1.0
    item, log_prob = sample_softmax(torch.full((4, 1), size), v, num_samples=3, backend=backend)
    assert (item == 321).all() and (log_prob == 0.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(backend: Backend, value: float) -> None:
    bias = torch.zeros(600)
    bias[400] = value
    with pytest.raises(OperatorError, match="row 0 has a logit that is NaN or infinite"):
        sample_softmax(torch.zeros(2, 1), torch.zeros(600, 1), item_bias=bias, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_normalizer_is_that_of_the_terms(backend: Backend) -> None:
    u, v = normal(9, 6, seed=1), normal(3000, 6, seed=2)
    drawn = draw_softmax(u, v, num_samples=2, backend=backend)
    terms = policy_terms(u.double(), v.double(), drawn.item[:, 1])
    torch.testing.assert_close(drawn.log_normalizer, terms.log_normalizer, rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn.log_prob[:, 1].double(), terms.log_prob, rtol=0, atol=3e-6)


def test_an_empty_batch_draws_nothing() -> None:
    lists = Eligibility(candidates=ItemLists(torch.zeros(1).long(), torch.zeros(0).long()))
    for eligible in (None, lists):
        item, log_prob = sample_softmax(
            torch.zeros(0, 2), torch.zeros(5, 2), eligible=eligible, num_samples=3
        )
        assert item.shape == log_prob.shape == (0, 3)


def test_the_number_of_draws_is_checked() -> None:
    with pytest.raises(OperatorError, match="num_samples must lie in"):
        sample_softmax(torch.zeros(1, 1), torch.zeros(2, 1), num_samples=0)
