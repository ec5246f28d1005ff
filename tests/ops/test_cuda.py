"""The CUDA operators on a GPU: accuracy, bits, graphs, streams. `make test-gpu` runs these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops import (
    FactoredReward,
    available_backends,
    backend_status,
    merge_partials,
    partial_terms,
    policy_terms,
    sample_softmax,
    top_k,
)
from offtower.ops.library import policy_arguments, policy_terms_op
from offtower.ops.types import Operands, RewardOperands
from tests.ops.cases import KINDS, Case, check_errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "cuda" not in available_backends(), reason=f"CUDA core: {backend_status()['cuda']}"
    ),
]

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(1, 1, 1), (1, 300, 16), (3, 5, 2), (17, 513, 33), (130, 1500, 64), (70, 97, 130)]


def on_gpu(case: Case) -> dict[str, Tensor]:
    return case.native("cuda")


@pytest.fixture(autouse=True)
def full_float32() -> Any:
    """Compare float32 with full float32, not with tf32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def operands(rows: int, items: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(rows + items)

    def draw(n: int) -> Tensor:
        return (torch.randn(n, dim, generator=g, device="cuda") * dim**-0.25).to(dtype)

    action = torch.randint(0, items, (rows,), generator=g, device="cuda")
    return [draw(rows), draw(items), action, draw(rows), draw(items)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 6.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_within_twice_those_of_torch(
    dtype: torch.dtype, scale: float, kind: str
) -> None:
    """Two roundings of tolerance: of the result, and of the reference maximum to nats and back."""
    for shape in [*SHAPES, (300, 5000, 256), (65, 20_000, 128)]:
        check_errors(shape, kind, dtype, scale, on_gpu, seeds=range(2), device="cuda", roundings=2)


@pytest.mark.parametrize("kind", KINDS)
def test_sanitized(kind: str) -> None:
    """Small enough for compute-sanitizer (`make test-gpu-sanitized`)."""
    for dtype in DTYPES:
        for shape in ((3, 5, 2), (140, 700, 64), (17, 300, 200)):
            check_errors(
                shape, kind, dtype, 1.0, on_gpu, seeds=range(1), device="cuda", roundings=2
            )
        x = Case(70, 300, 24, kind, dtype, device="cuda")
        top_k(x.u, x.v, 7, item_bias=x.b, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_million_items(dtype: torch.dtype) -> None:
    """Near-uniform policies reveal a dropped tile or the bias of a long sum."""
    u, v, action, e, t = operands(256, 1_000_003, 64, dtype)
    reward = FactoredReward(e, t, link="sigmoid")
    results = []
    for wide, backend in ((False, "cuda"), (True, "reference")):
        x, y, ee, tt = ((z.double() if wide else z) for z in (u, v, e, t))
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        terms = policy_terms(
            x, y, action, entropy=True, backend=backend,  # type: ignore[arg-type]
            reward_model=FactoredReward(ee, tt, link="sigmoid"),
        )  # fmt: skip
        assert terms.expected_reward is not None and terms.entropy is not None
        (terms.log_prob.sum() + 3 * terms.expected_reward.sum() + terms.entropy.sum()).backward()
        assert x.grad is not None and y.grad is not None
        values = (terms.log_prob, terms.log_normalizer, terms.expected_reward, terms.entropy)
        results.append([z.detach().double() for z in (*values, x.grad, y.grad)])
    del reward
    ours, exact = results
    for got, wanted in zip(ours[:4], exact[:4], strict=True):
        assert ((got - wanted).abs() / wanted.abs()).max() < 2e-6
    bound = 1e-5 if dtype is torch.float32 else 4e-3
    for got, wanted in zip(ours[4:], exact[4:], strict=True):
        assert (got - wanted).norm() < bound * wanted.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 30_000, 64), (64, 3_000, 128), (1024, 700, 256)])
def test_same_bits_a_thousand_times(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    u, v, action, e, t = operands(*shape, dtype)
    u.requires_grad_(), v.requires_grad_()
    reward = FactoredReward(e, t, link="sigmoid")
    first: list[Tensor] | None = None
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        terms = policy_terms(u, v, action, reward_model=reward, entropy=True, backend="cuda")
        assert terms.expected_reward is not None and terms.entropy is not None
        loss = (terms.log_prob + terms.expected_reward + terms.entropy).sum()
        now = [loss, terms.log_normalizer, *torch.autograd.grad(loss, (u, v))]
        first = first or now
        for a, b in zip(now, first, strict=True):
            different += (a != b).sum()
    assert int(different) == 0


def test_more_rows_than_a_grid_dimension() -> None:
    """70,000 rows; the same rows in two calls have the same terms."""
    u, v, action, _, _ = operands(70_000, 400, 16, torch.bfloat16)
    whole = policy_terms(u, v, action, backend="cuda").log_prob
    for part in (slice(0, 100), slice(69_900, 70_000)):
        some = policy_terms(u[part], v, action[part], backend="cuda").log_prob
        torch.testing.assert_close(whole[part], some, rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits() -> None:
    """N d = 2.2e9 elements: the last items are read and their gradients written."""
    items, dim = 34_000_000, 64
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    v = torch.zeros(items, dim, dtype=torch.bfloat16, device="cuda")
    v[-1] = 1.0
    u = torch.ones(4, dim, dtype=torch.bfloat16, device="cuda")
    action = torch.tensor([items - 1, 0, 5, items - 2], device="cuda")
    v.requires_grad_()
    terms = policy_terms(u, v, action, backend="cuda")
    lse = torch.tensor(64.0, dtype=torch.float64).exp().add(items - 1).log()
    torch.testing.assert_close(
        terms.log_normalizer.double().cpu(), lse.expand(4), rtol=1e-6, atol=0
    )
    (terms.log_prob * torch.tensor([2.0, 1.0, 1.0, 1.0], device="cuda")).sum().backward()
    assert v.grad is not None
    expected = torch.tensor([-3.0, 1.0, 1.0])  # all mass is on the last item
    torch.testing.assert_close(v.grad[[-1, 0, -2], 0].float().cpu(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_capture(dtype: torch.dtype) -> None:
    """A captured forward and backward pass, replayed after its inputs have changed."""
    u, v, action, e, t = operands(200, 5000, 40, dtype)
    u.requires_grad_(), v.requires_grad_()
    reward = FactoredReward(e, t)

    def step() -> list[Tensor]:
        terms = policy_terms(u, v, action, reward_model=reward, backend="cuda")
        assert terms.expected_reward is not None
        loss = (terms.log_prob + terms.expected_reward).sum()
        return [loss, *torch.autograd.grad(loss, (u, v))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        u.copy_(torch.randn_like(u))
        action.copy_(torch.randint_like(action, 5000))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


def test_several_streams() -> None:
    """Concurrent calls on four streams give the same bits as sequential calls."""
    cases = [operands(128, 20_000 + i, 64, torch.bfloat16) for i in range(8)]
    alone = [policy_terms(u, v, a, backend="cuda").log_prob for u, v, a, _, _ in cases]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    together = []
    for i, (u, v, a, _, _) in enumerate(cases):
        with torch.cuda.stream(streams[i % 4]):
            together.append(policy_terms(u, v, a, backend="cuda").log_prob)
    torch.cuda.synchronize()
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_calls_do_not_synchronize() -> None:
    u, v, action, e, t = operands(128, 20_000, 64, torch.bfloat16)
    u.requires_grad_(), v.requires_grad_()
    policy_terms(u, v, action, backend="cuda").log_prob.sum().backward()  # load the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms = policy_terms(u, v, action, reward_model=FactoredReward(e, t), entropy=True)
        assert terms.expected_reward is not None
        (terms.log_prob + terms.expected_reward).sum().backward()
        top_k(u.detach(), v.detach(), 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compile_has_no_graph_breaks() -> None:
    u, v, action, _, _ = operands(64, 3000, 32, torch.bfloat16)

    def loss(u: Tensor, v: Tensor) -> Tensor:
        return policy_terms(u, v, action, backend="cuda").log_prob.sum() * 2

    compiled = torch.compile(loss, fullgraph=True)
    results = []
    for call in (loss, compiled):
        x, y = u.clone().requires_grad_(), v.clone().requires_grad_()
        call(x, y).backward()
        results.append((x.grad, y.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_opcheck() -> None:
    u, v, action, e, t = operands(5, 40, 8, torch.float32)
    reward = RewardOperands(context=e, item=t, sigmoid=True)
    x = Operands(u.requires_grad_(), v.requires_grad_(), action, 0.7, reward=reward)
    torch.library.opcheck(policy_terms_op, (True, "cuda", *policy_arguments(x)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_slices_equal_the_whole(dtype: torch.dtype) -> None:
    u, v, action, e, t = operands(50, 9000, 64, dtype)
    whole = policy_terms(u, v, action, reward_model=FactoredReward(e, t), entropy=True)
    parts = []
    for start, stop in ((0, 4000), (4000, 4001), (4001, 9000)):
        here = (action >= start) & (action < stop)
        part = partial_terms(
            u,
            v[start:stop],
            torch.where(here, action - start, -1),
            reward_model=FactoredReward(e, t[start:stop]),
            entropy=True,
            backend="cuda",
        )
        parts.append(part)
    merged = merge_partials(parts).finish()
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(merged, name), value, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_equals_a_stable_sort_of_the_logits(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(8)
    for rows, items in ((1, 1), (3, 7), (66, 700), (130, 200_000)):
        u = torch.randint(-2, 3, (rows, 5), generator=g).to("cuda", dtype)
        v = torch.randint(-2, 3, (items, 5), generator=g).to("cuda", dtype)
        b = torch.randint(-1, 2, (items,), generator=g).to("cuda", dtype)
        full = u.float() @ v.float().T / 0.5 + b.float()
        order = torch.argsort(full, dim=1, descending=True, stable=True)
        for k in {1, min(items, 1000) // 2 + 1, min(items, 1000)}:
            scores, index = top_k(u, v, k, temperature=0.5, item_bias=b, backend="cuda")
            assert torch.equal(index, order[:, :k])
            assert torch.equal(scores, full.gather(1, index))


def test_tf32_on_request() -> None:
    """Only products are rounded, and only where torch allows tf32."""
    u, v, action, e, t = operands(130, 3000, 64, torch.float32)
    u.requires_grad_(), v.requires_grad_()

    def terms(backend: Any) -> list[Tensor]:
        found = policy_terms(u, v, action, reward_model=FactoredReward(e, t), backend=backend)
        assert found.expected_reward is not None
        loss = (found.log_prob + found.expected_reward).sum()
        values = [found.log_prob.detach(), found.expected_reward.detach()]
        return [*values, *torch.autograd.grad(loss, (u, v))]

    exact, full = terms("reference"), terms("cuda")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    rounded = terms("cuda")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert all(torch.equal(a, b) for a, b in zip(terms("cuda"), full, strict=True))
    for wanted, ours, loose in zip(exact, full, rounded, strict=True):
        assert (ours - wanted).norm() < 1e-5 * wanted.norm()
        assert 1e-6 * wanted.norm() < (loose - wanted).norm() < 2e-3 * wanted.norm()


def test_invalid_actions_affect_only_their_rows() -> None:
    u, v, _, _, _ = operands(4, 300, 16, torch.bfloat16)
    action = torch.tensor([299, 300, 5_000_000_000, -1], device="cuda")
    terms = policy_terms(u, v, action, backend="cuda")
    assert torch.isfinite(terms.log_prob[0]) and torch.isfinite(terms.log_normalizer).all()
    assert torch.isnan(terms.log_prob[1:3]).all() and terms.log_prob[3] == float("-inf")


def test_unsupported_operands_use_the_reference() -> None:
    u, v, action, _, _ = operands(4, 50, 300, torch.float32)
    assert torch.isfinite(policy_terms(u, v, action).log_prob).all()
    with pytest.raises(OperatorError, match="up to 256"):
        policy_terms(u, v, action, backend="cuda")
    with pytest.raises(OperatorError, match=r"got torch\.float64"):
        policy_terms(u.double(), v.double(), action, backend="cuda")


def test_reference_accepts_cuda_tensors() -> None:
    u, v, action, e, t = operands(9, 200, 8, torch.float32)
    reward = FactoredReward(e, t, link="sigmoid")
    here = policy_terms(u, v, action, reward_model=reward, entropy=True, backend="reference")
    cpu = policy_terms(
        u.cpu(), v.cpu(), action.cpu(), entropy=True, backend="reference",
        reward_model=FactoredReward(e.cpu(), t.cpu(), link="sigmoid"),
    )  # fmt: skip
    for name, value in vars(cpu).items():
        torch.testing.assert_close(getattr(here, name).cpu(), value, rtol=1e-4, atol=1e-5)
    assert top_k(u, v, 3, backend="reference")[1].is_cuda
    for generator in (None, torch.Generator().manual_seed(1)):
        items, log_prob = sample_softmax(u, v, num_samples=5, generator=generator)
        assert items.is_cuda and log_prob.is_cuda and items.shape == (9, 5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    u, v, action, _, _ = operands(40, 3000, 64, torch.bfloat16)
    first = policy_terms(u, v, action, backend="cuda").log_prob
    second = policy_terms(*(x.to("cuda:1") for x in (u, v, action)), backend="cuda").log_prob
    assert second.get_device() == 1 and torch.equal(first.cpu(), second.cpu())
