"""The native core against float64, for every instruction set that this machine runs.

The bar is what torch itself reaches in the same dtype: the same terms by stable eager torch
(max-shifted; entropy as log Z - sum p (s - max)) from the same rounded inputs.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from offtower.ops import (
    DenseReward,
    FactoredReward,
    available_instruction_sets,
    policy_terms,
    top_k,
)

pytestmark = pytest.mark.skipif(
    not available_instruction_sets(), reason="the native core is not built"
)

ISAS = available_instruction_sets()
KINDS = ("none", "dense", "identity", "sigmoid")
NAMES = ("log_prob", "log_normalizer", "expected_reward", "entropy", "du", "dv", "db")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OFFTOWER_CPU_ISA", request.param)
    return str(request.param)


class Case:
    """Operands rounded to `dtype` once, so that only the computation differs."""

    def __init__(
        self,
        rows: int,
        items: int,
        dim: int,
        kind: str,
        dtype: torch.dtype,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(rows * 7919 + items * 31 + dim + seed * 1_000_003)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=g).to(dtype)

        self.u = draw(rows, dim) * scale
        self.v, self.b = draw(items, dim) * scale / math.sqrt(dim), draw(items)
        self.action = torch.randint(0, items, (rows,), generator=g)
        self.reward: Any = None
        if kind == "dense":
            self.reward = DenseReward(draw(rows, items))
        elif kind != "none":
            width = min(dim, 24)
            self.reward = FactoredReward(
                draw(rows, width) / math.sqrt(width),
                draw(items, width),
                draw(items),
                kind,  # type: ignore[arg-type]
            )
        self.cotangents = torch.randn(4, rows, dtype=torch.float64, generator=g)

    def _results(self, outputs: list[Tensor | None], leaves: list[Tensor]) -> dict[str, Tensor]:
        there = [(o, c) for o, c in zip(outputs, self.cotangents, strict=True) if o is not None]
        torch.stack([(o * c.to(o.dtype)).sum() for o, c in there]).sum().backward()
        gradients = [leaf.grad for leaf in leaves]
        return {
            name: value.detach().double()
            for name, value in zip(NAMES, [*outputs, *gradients], strict=True)
            if value is not None
        }

    def native(self) -> dict[str, Tensor]:
        leaves = [x.clone().requires_grad_() for x in (self.u, self.v, self.b)]
        t = policy_terms(
            leaves[0], leaves[1], self.action, temperature=0.7, item_bias=leaves[2],
            reward_model=self.reward, entropy=True, backend="cpu",
        )  # fmt: skip
        return self._results([t.log_prob, t.log_normalizer, t.expected_reward, t.entropy], leaves)

    def torch(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Eager torch in `dtype`, with the whole matrix of logits."""
        leaves = [x.to(dtype).requires_grad_() for x in (self.u, self.v, self.b)]
        u, v, b = leaves
        s = u @ v.T / 0.7 + b
        shifted = s - s.detach().amax(1, keepdim=True)
        mass = shifted.exp()
        total = mass.sum(1)
        pi = mass / total[:, None]
        lse = s.detach().amax(1) + total.log()
        log_prob = shifted.gather(1, self.action[:, None])[:, 0] - total.log()
        expected = None
        if self.reward is not None:
            expected = (pi * self._q(dtype)).sum(1)
        entropy = total.log() - (pi * shifted).sum(1)
        return self._results([log_prob, lse, expected, entropy], leaves)

    def _q(self, dtype: torch.dtype) -> Tensor:
        if isinstance(self.reward, DenseReward):
            return self.reward.values.to(dtype)
        r = self.reward
        q = r.context.to(dtype) @ r.item.to(dtype).T + r.item_bias.to(dtype)
        return torch.sigmoid(q) if r.link == "sigmoid" else q


SHAPES = [(1, 1, 1), (1, 300, 16), (3, 5, 2), (17, 513, 33), (130, 1500, 64), (70, 97, 130)]
SEEDS = range(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 6.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_within_twice_those_of_torch(
    isa: str, dtype: torch.dtype, scale: float, kind: str
) -> None:
    """Ragged shapes; near-uniform to so peaked that logits pass 1e4.

    Root mean squares over rows and seeds: single errors are a few roundings, and the ratio of two
    largest ones says little. On top of twice torch's there is one rounding of the result (of 1,
    where it is smaller: log-probabilities are differences of such numbers), since torch is at
    times exact.
    """
    for shape in SHAPES:
        errors: dict[str, list[list[Tensor]]] = {}
        size: dict[str, float] = {}
        for seed in SEEDS:
            case = Case(*shape, kind, dtype, scale, seed)
            exact, native, plain = case.torch(torch.float64), case.native(), case.torch(dtype)
            assert native.keys() == exact.keys()
            for name, wanted in exact.items():
                pair = errors.setdefault(name, [[], []])
                pair[0].append((native[name] - wanted).flatten())
                pair[1].append((plain[name] - wanted).flatten())
                size[name] = max(size.get(name, 0.0), float(wanted.abs().max()))
        for name, (ours, torchs) in errors.items():
            gradient = name in ("du", "dv", "db")
            rounded_to = dtype if gradient else torch.float32
            floor = (
                torch.finfo(rounded_to).eps / 2 * (size[name] if gradient else max(1, size[name]))
            )
            mine, bar = rms(ours), 2 * rms(torchs) + floor
            assert mine <= bar, (name, shape, mine, bar)


def rms(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).square().mean().sqrt())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "sigmoid"])
def test_same_bits_on_every_run_and_with_any_number_of_threads(
    isa: str, dtype: torch.dtype, kind: str
) -> None:
    """20,000 items: segments forward and sixty-four backward; three blocks of rows and more."""
    case = Case(200, 20_000, 40, kind, dtype)
    before = torch.get_num_threads()
    first: dict[str, Tensor] | None = None
    try:
        for threads in (1, 2, 3, 7, 2, 1):
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
