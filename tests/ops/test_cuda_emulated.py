"""The CUDA kernels against float64, run on an emulated thread block (see `cuda_emulation`)."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from offtower.ops import FactoredReward, merge_partials, partial_terms, policy_terms, top_k
from offtower.ops.cuda_core import CUDACore
from offtower.ops.reference import ReferenceCore
from offtower.ops.types import Operands
from tests.ops import cuda_emulation
from tests.ops.cases import KINDS, Case, Variant, check_errors

pytestmark = pytest.mark.skipif(
    bool(cuda_emulation.why_not()), reason=cuda_emulation.why_not() or "runs"
)

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["sm_80", "sm_90"])
def device(
    request: pytest.FixtureRequest, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The emulated device. Hopper's kernels accept bfloat16 without dense rewards."""
    cuda_emulation.put_in_place(module, request.param, monkeypatch)
    return str(request.param)


def emulated(case: Case) -> dict[str, Tensor]:
    return case.native("auto")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "scale"), [*((kind, 1.0) for kind in KINDS), ("none", 100.0), ("sigmoid", 100.0)]
)
def test_errors_are_at_most_twice_those_of_torch(
    device: str, dtype: torch.dtype, scale: float, kind: str
) -> None:
    """Ragged shapes that are split, padded, and span several blocks of rows; logits up to 1e4.

    The reference maximum is rounded to nats and back between the passes, which costs a second
    rounding of a gradient.
    """
    if device == "sm_90" and (dtype is torch.float32 or kind == "dense"):
        pytest.skip("runs on the portable kernels there")
    for shape in ((1, 1, 1), (5, 9, 2), (140, 520, 40), (17, 900, 72)):
        check_errors(shape, kind, dtype, scale, emulated, seeds=range(1), roundings=2)


@pytest.mark.parametrize("width", [192, 256])
def test_wide_embeddings(device: str, width: int) -> None:
    for dtype in DTYPES:
        check_errors((40, 260, width), "sigmoid", dtype, 1.0, emulated, seeds=range(1), roundings=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "variant", [Variant(entropy=False), Variant(bias=False), Variant(entropy=False, bias=False)]
)
def test_accuracy_without_entropy_or_biases(device: str, kind: str, variant: Variant) -> None:
    """The entropy term is a template parameter; without biases, null pointers are passed."""
    if device == "sm_90" and kind == "dense":
        pytest.skip("runs on the portable kernels there")
    for shape in ((70, 300, 40), (17, 200, 128), (5, 140, 256)):
        check_errors(
            shape, kind, torch.bfloat16, 1.0, emulated, seeds=range(1), roundings=2, variant=variant
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_shared_memory(
    dtype: torch.dtype, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """99 KiB a block, as on sm_86: fewer rows a block and one tile in flight."""
    cuda_emulation.put_in_place(module, "sm_86", monkeypatch)
    for width in (64, 128):
        check_errors(
            (40, 260, width), "identity", dtype, 1.0, emulated, seeds=range(1), roundings=2
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_order_of_threads(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing barrier, or a buffer that is refilled too early, would make them depend on it."""
    case = Case(140, 520, 40, "sigmoid", dtype)
    first: dict[str, Tensor] | None = None
    for seed in range(3):
        monkeypatch.setenv("OFFTOWER_EMULATION_SEED", str(seed))
        again = emulated(case)
        scores, index = top_k(case.u, case.v, 9, item_bias=case.b)
        again |= {"scores": scores, "index": index}
        first = first or again
        for name, value in again.items():
            assert torch.equal(value, first[name]), (name, seed)


@pytest.mark.parametrize("link", ["identity", "sigmoid"])
def test_rewards_of_biases_alone(device: str, link: str) -> None:
    """A factored reward model of width 0."""
    case = Case(40, 300, 24, "identity", torch.bfloat16)
    case.reward = FactoredReward(
        torch.empty(40, 0).bfloat16(), torch.empty(300, 0).bfloat16(), case.b, link,  # type: ignore[arg-type]
    )  # fmt: skip
    ours, exact = emulated(case), case.torch(torch.float64)
    for name in ("expected_reward", "log_prob"):
        torch.testing.assert_close(ours[name], exact[name], rtol=2e-6, atol=2e-6)
    for name in ("du", "dv", "db"):
        assert (ours[name] - exact[name]).norm() < 6e-3 * exact[name].norm()


def rounded_to_tf32(x: Tensor) -> Tensor:
    """Round to 10 mantissa bits, to nearest, ties away from zero."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Allow tf32 in matrix products, as users do."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("on", ["sm_80", "sm_86", "sm_90"])
def test_tf32_on_request(
    on: str, tf32: None, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terms are those of rounded embeddings to float32's precision: only products are rounded.

    Score gradients are rounded for the second GEMM too, to a relative 2^-11.
    """
    cuda_emulation.put_in_place(module, on, monkeypatch)
    for shape, kind in (
        ((5, 9, 2), "none"),
        ((70, 520, 40), "identity"),
        ((40, 300, 130), "sigmoid"),
    ):
        case = Case(*shape, kind, torch.float32)
        ours = emulated(case)
        rounded = Case(*shape, kind, torch.float32)
        rounded.u, rounded.v = rounded_to_tf32(case.u), rounded_to_tf32(case.v)
        if kind != "none":
            r = case.reward
            rounded.reward = FactoredReward(
                rounded_to_tf32(r.context), rounded_to_tf32(r.item), r.item_bias, r.link
            )
        exact = rounded.torch(torch.float64)
        for name in exact:
            error = (ours[name] - exact[name]).norm() / exact[name].norm()
            assert error < (1e-3 if name in ("du", "dv") else 1e-6), (name, shape)
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert not torch.equal(ours["log_prob"], emulated(case)["log_prob"])
        torch.backends.cuda.matmul.fp32_precision = "tf32"


def test_top_k_is_exact_under_tf32(
    tf32: None, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_emulation.put_in_place(module, "sm_80", monkeypatch)
    case = Case(20, 300, 24, "none", torch.float32)
    scores, _ = top_k(case.u, case.v, 5)
    wanted = (case.u.double() @ case.v.double().T).topk(5).values
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_requested_gradients_are_computed(device: str, dtype: torch.dtype) -> None:
    case = Case(40, 300, 24, "identity", dtype)
    whole = emulated(case)
    for wanted in (("du",), ("dv",), ("db",), ("du", "db")):
        leaves = {"du": case.u.clone(), "dv": case.v.clone(), "db": case.b.clone()}
        for name in wanted:
            leaves[name].requires_grad_()
        t = policy_terms(
            leaves["du"], leaves["dv"], case.action, temperature=0.7, item_bias=leaves["db"],
            reward_model=case.reward, entropy=True,
        )  # fmt: skip
        outputs = (t.log_prob, t.log_normalizer, t.expected_reward, t.entropy)
        loss = torch.stack(
            [(o * c.float()).sum() for o, c in zip(outputs, case.cotangents, strict=True)]  # type: ignore[operator]
        ).sum()
        loss.backward()
        for name, leaf in leaves.items():
            if name in wanted:
                assert leaf.grad is not None and torch.equal(leaf.grad.double(), whole[name])
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_slices_of_items_equal_the_whole(device: str, dtype: torch.dtype) -> None:
    case = Case(9, 500, 16, "identity", dtype)
    whole = policy_terms(
        case.u, case.v, case.action, item_bias=case.b, reward_model=case.reward, entropy=True
    )
    r, parts = case.reward, []
    for start, stop in ((0, 130), (130, 131), (131, 500)):
        here = (case.action >= start) & (case.action < stop)
        reward = FactoredReward(r.context, r.item[start:stop], r.item_bias[start:stop])
        part = partial_terms(
            case.u,
            case.v[start:stop],
            torch.where(here, case.action - start, -1),
            item_bias=case.b[start:stop],
            reward_model=reward,
            entropy=True,
        )
        parts.append(part)
        assert torch.isinf(parts[-1].action_logit).equal(~here)
    merged = merge_partials(parts).finish()
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(merged, name), value, rtol=2e-6, atol=2e-6)


def test_top_k_equals_a_stable_sort_of_the_logits(device: str) -> None:
    """Small integers are exact in every dtype and make many ties; k up to all items."""
    g = torch.Generator().manual_seed(8)
    for dtype in DTYPES:
        for rows, items in ((1, 1), (3, 7), (66, 700)):
            u = torch.randint(-2, 3, (rows, 5), generator=g).to(dtype)
            v = torch.randint(-2, 3, (items, 5), generator=g).to(dtype)
            b = torch.randint(-1, 2, (items,), generator=g).to(dtype)
            full = u.float() @ v.float().T / 0.5 + b.float()
            order = torch.argsort(full, dim=1, descending=True, stable=True)
            for k in {1, items // 2 + 1, items}:
                scores, index = top_k(u, v, k, temperature=0.5, item_bias=b)
                assert torch.equal(index, order[:, :k])
                assert torch.equal(scores, full.gather(1, index))


def test_top_k_puts_nan_first_and_masked_items_last(device: str) -> None:
    u, v = torch.ones(2, 1), torch.arange(200.0)[:, None]
    v[5] = v[150] = float("nan")
    bias = torch.zeros(200)
    bias[100:] = float("-inf")
    bias[150] = 0.0
    scores, index = top_k(u, v, 200, item_bias=bias)
    assert index[0, :4].tolist() == [5, 150, 99, 98]
    assert torch.isnan(scores[:, :2]).all()
    assert (scores[:, -99:] == float("-inf")).all()
    assert index[0].sort().values.tolist() == list(range(200))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_items_and_impossible_actions(device: str, dtype: torch.dtype) -> None:
    """Masked items are as if absent; an action beyond the items is NaN and spoils no other row.

    Item 299 is the last column before the padding of the last tile.
    """
    case = Case(6, 300, 8, "none", dtype)
    bias = case.b.clone()
    bias[:140] = float("-inf")
    action = torch.tensor([299, 200, 300, 5_000_000_000, -1, 140])
    terms = policy_terms(case.u, case.v, action.clamp(140, 299), item_bias=bias)
    kept = policy_terms(case.u, case.v[140:], action.clamp(140, 299) - 140, item_bias=bias[140:])
    torch.testing.assert_close(terms.log_normalizer, kept.log_normalizer)
    torch.testing.assert_close(terms.log_prob, kept.log_prob)
    odd = CUDACore().forward(Operands(case.u, case.v, action, item_bias=bias), False)
    assert torch.equal(odd.log_prob[[0, 1, 5]], terms.log_prob[[0, 1, 5]])
    assert torch.isnan(odd.log_prob[[2, 3]]).all() and odd.log_prob[4] == float("-inf")
    assert torch.isfinite(odd.log_normalizer).all()


def test_log_probabilities_are_not_above_zero(device: str) -> None:
    """The target's logit has the same bits as in the normalizer, however large it is."""
    for dtype in DTYPES:
        case = Case(33, 50, 40, "none", dtype, scale=100.0)
        best = (case.u.double() @ case.v.double().T).argmax(1)
        terms = policy_terms(case.u, case.v, best, entropy=True)
        assert (terms.log_prob <= 0).all()
        assert terms.entropy is not None and (terms.entropy >= 0).all()


H200 = "9 0 132 231424 233472"
A100 = "8 0 108 165888 167936"
SMALL = "8 6 84 100352 102400"


@pytest.mark.parametrize("facts", [H200, A100, SMALL])
@pytest.mark.parametrize("dtype", [0, 1])
def test_plans_fit_and_fill_the_device(
    facts: str, dtype: int, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles fit, large problems keep the device busy, partial sums are limited."""
    monkeypatch.setenv("OFFTOWER_EMULATED_DEVICE", facts)
    multiprocessors, block_shared = (int(x) for x in facts.split()[2:4])
    for rows in (1, 100, 1024, 70_000):
        for items in (1, 5000, 1_000_000, 1 << 31):
            for dim, kind, reward_dim in ((64, 0, 0), (128, 3, 128), (256, 2, 64), (64, 1, 0)):
                plans = module.plans(
                    dtype=dtype, rows=rows, items=items, dim=dim, reward=kind,
                    reward_dim=reward_dim, device=0,
                )  # fmt: skip
                for name, plan in plans.items():
                    if not plan["fits"]:
                        # Wide float32 on the small device: the reference serves.
                        assert facts == SMALL and dtype == 0 and dim + reward_dim > 256
                        continue
                    assert plan["shared_bytes"] <= block_shared
                    assert 1 <= plan["blocks"] < 1 << 31 and 1 <= plan["splits"] <= 512
                    if rows >= 1024 and items >= 1_000_000:
                        assert plan["blocks"] >= 0.9 * multiprocessors
                    if plan["splits"] > 1 and name != "forward":
                        stay = rows if name == "du" else items
                        assert plan["splits"] * stay * dim * 4 <= 256 << 20
                    if facts == H200 and dtype == 1 and kind != 1 and dim + reward_dim <= 256:
                        assert plan["hopper"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_eligible_items(device: str, dtype: torch.dtype, kind: str) -> None:
    """Bitmaps of groups; Hopper's devices run the portable kernels."""
    variant = Variant(eligible="bitmap", entropy=kind != "none")
    for shape in ((1, 1, 1), (5, 9, 2), (140, 520, 40)):
        check_errors(
            shape, kind, dtype, 1.0, emulated, seeds=range(1), roundings=2, variant=variant
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_of_eligible_items(device: str, dtype: torch.dtype) -> None:
    """Rows with fewer eligible items than k end with -inf and -1."""
    case = Case(40, 300, 24, "none", dtype, variant=Variant(eligible="bitmap"))
    found = top_k(case.u, case.v, 200, item_bias=case.b, eligible=case.eligible)
    wanted = ReferenceCore().top_k(
        Operands(case.u, case.v, case.action, item_bias=case.b, eligible=case.eligible), 200
    )
    assert bool((wanted[1] < 0).any())
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    chosen = found[1].clamp_min(0)
    assert torch.equal(found[1] < 0, wanted[1] < 0)
    assert bool((case.mask.gather(1, chosen) | (found[1] < 0)).all())


@pytest.mark.parametrize("device_name", ["sm_80", "sm_90"])
def test_slices_of_eligible_items_merge(
    device_name: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice may have no eligible item for a row."""
    case = Case(40, 300, 24, "identity", torch.float32, variant=Variant(eligible="bitmap"))
    assert case.eligible is not None
    whole = policy_terms(
        case.u, case.v, case.action, item_bias=case.b, eligible=case.eligible, backend="reference"
    )
    cuda_emulation.put_in_place(module, device_name, monkeypatch)
    parts = []
    for start, stop in ((0, 100), (100, 101), (101, 300)):
        inside = (case.action >= start) & (case.action < stop)
        parts.append(
            partial_terms(
                case.u, case.v[start:stop], torch.where(inside, case.action - start, -1),
                item_bias=case.b[start:stop], eligible=case.eligible.slice_items(start, stop),
            )
        )  # fmt: skip
    merged = merge_partials(parts).finish()
    torch.testing.assert_close(merged.log_prob, whole.log_prob, rtol=1e-5, atol=1e-5)
