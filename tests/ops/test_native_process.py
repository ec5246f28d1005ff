"""The CPU core in a process: memory, threads, forks, signals, graphs, invalid operands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops import (
    FactoredReward,
    available_instruction_sets,
    merge_partials,
    partial_terms,
    policy_terms,
    top_k,
)
from offtower.ops.library import policy_arguments, policy_terms_op
from offtower.ops.types import Operands, RewardOperands

pytestmark = pytest.mark.skipif(
    not available_instruction_sets(), reason="the native core is not built"
)


def operands(rows: int, items: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, dim, generator=g),
        torch.randn(items, dim, generator=g),
        torch.randint(0, items, (rows,), generator=g),
    )


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_beyond_inputs_and_outputs_is_of_the_order_of_the_rows() -> None:
    """N = 1e6, B = 64, DR forward and backward: the (B, N) matrix alone would be 244 MiB.

    Allowed: a hundred arrays of B x d (two threads and the merge tree hold about ten), and 4 MiB,
    of which the interpreter and the allocator take most.
    """
    code = """
import torch
from pathlib import Path
from offtower.ops import FactoredReward, policy_terms

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

torch.set_num_threads(2)
rows, items, dim = 64, 1_000_000, 8
u, v = torch.randn(rows, dim, requires_grad=True), torch.randn(items, dim, requires_grad=True)
reward = FactoredReward(torch.randn(rows, dim), torch.randn(items, dim), link="sigmoid")
action = torch.randint(0, items, (rows,))

policy_terms(u, v[:100].detach(), action % 100, entropy=True).entropy.sum().backward()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
before = status("VmRSS")
terms = policy_terms(u, v, action, reward_model=reward, entropy=True)
(terms.log_prob + terms.expected_reward + terms.entropy).sum().backward()
print(status("VmHWM") - before - v.grad.numel() * 4)
"""
    beyond = int(python(code))
    assert beyond < 100 * 64 * 8 * 4 + (4 << 20)


def test_forked_and_spawned_workers_compute_too(tmp_path: Path) -> None:
    """A fork after the core has run in the parent, as data loaders do; and a fresh interpreter."""
    code = """
import multiprocessing, torch
from offtower.ops import policy_terms

def work(queue):
    g = torch.Generator().manual_seed(1)
    u, v = torch.randn(100, 16, generator=g), torch.randn(9_000, 16, generator=g)
    queue.put(policy_terms(u, v, torch.arange(100)).log_prob.sum().item())

if __name__ == "__main__":
    torch.set_num_threads(2)
    here = multiprocessing.SimpleQueue()
    work(here)
    expected = here.get()
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        child = context.Process(target=work, args=(queue,))
        child.start()
        child.join(60)
        assert child.exitcode == 0, (method, child.exitcode)
        assert queue.get() == expected
"""
    path = tmp_path / "work.py"
    path.write_text(code)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("own", [False, True])
def test_a_call_starts_no_more_threads_than_torch_has(own: bool) -> None:
    """Threads of the process while the core computes.

    On torch's pool: none beyond it. In a forked child, where that pool is not to be used: two
    helpers beside the calling thread, which end with the call.
    """
    code = f"""
import os, sys, threading, time, torch
from offtower.ops import _cpu
torch.set_num_threads(3)
torch.zeros(2000, 2000).exp()  # makes torch's pool
if {own}:
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
import numpy as np
u, v = np.zeros((512, 64), np.float32), np.zeros((200_000, 64), np.float32)
operands = _cpu.Operands(context=u.__dlpack__(), item=v.__dlpack__())
def threads():
    return len(os.listdir("/proc/self/task"))
idle, seen, done = threads(), [], False
def watch():
    while not done:
        seen.append(threads())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
_cpu.forward(operands, threads=3, isa="")
done = True
watcher.join()
end = time.monotonic() + 10
while threads() > idle and time.monotonic() < end:
    time.sleep(0.001)  # a joined thread is listed for a moment longer
print(_cpu.uses_torch_threads(), max(seen) - idle - 1, threads() - idle, flush=True)
os._exit(0)
"""
    torchs, during, after = python(code).split()
    assert int(after) <= 0  # below where a thread of the start-up ended meanwhile
    helpers = 2 if own or torchs == "False" else 0
    assert helpers - 1 <= int(during) <= helpers


def test_a_signal_ends_a_long_call_and_other_threads_run_meanwhile() -> None:
    """SIGALRM a third of a second into many seconds of work; a thread counts while the GIL is free.

    The first call lets torch import what it imports at first calls.
    """
    code = """
import signal, threading, time, torch
from offtower.ops import policy_terms
class Alarm(Exception): pass
def ring(*_): raise Alarm
signal.signal(signal.SIGALRM, ring)
count, stop = 0, False
def work():
    global count
    while not stop:
        count += 1
        time.sleep(0.001)
thread = threading.Thread(target=work); thread.start()
u, v = torch.zeros(16_384, 256), torch.zeros(200_000, 256)
policy_terms(u[:3], v[:3], torch.zeros(3, dtype=torch.int64))
signal.setitimer(signal.ITIMER_REAL, 0.3)
begin = time.perf_counter()
try:
    policy_terms(u, v, torch.zeros(16_384, dtype=torch.int64))
except Alarm:
    print("interrupted", count > 20)
stop = True
thread.join()
terms = policy_terms(u[:3], v[:3], torch.zeros(3, dtype=torch.int64))
print(float(terms.log_normalizer[0].exp().round()))
"""
    assert python(code).split() == ["interrupted", "True", "3.0"]


def test_more_threads_than_tasks() -> None:
    code = """
import torch
from offtower.ops import policy_terms
u, v = torch.ones(300, 4), torch.arange(20_000.0)[:, None].expand(-1, 4).contiguous() / 1e5
action = torch.zeros(300, dtype=torch.int64)
torch.set_num_threads(1)
one = policy_terms(u, v, action).log_prob
torch.set_num_threads(64)
many = policy_terms(u, v, action).log_prob
print(torch.equal(one, many))
"""
    assert python(code).strip() == "True"


def test_a_forced_instruction_set_must_exist() -> None:
    u, v, action = operands(3, 5, 2)
    os.environ["OFFTOWER_CPU_ISA"] = "mmx"
    try:
        with pytest.raises(ValueError, match="OFFTOWER_CPU_ISA=mmx is not an instruction set"):
            policy_terms(u, v, action, backend="cpu")
    finally:
        del os.environ["OFFTOWER_CPU_ISA"]


def test_float64_falls_back_to_the_reference() -> None:
    u, v, action = operands(3, 5, 2)
    with pytest.raises(OperatorError, match=r"float32 and bfloat16.*got torch.float64"):
        policy_terms(u.double(), v.double(), action, backend="cpu")
    assert policy_terms(u.double(), v.double(), action).log_prob.dtype == torch.float64


@pytest.mark.parametrize("temperature", [1e-40, 1e39])
def test_temperatures_beyond_float32(temperature: float) -> None:
    u, v, action = operands(3, 5, 2)
    with pytest.raises(OperatorError, match="beyond float32's range"):
        policy_terms(u, v, action, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_operands(dtype: torch.dtype) -> None:
    """Views, transposes and odd offsets give the results of their contiguous copies."""
    u, v, action = operands(6, 40, 10)
    wide = torch.zeros(40, 21, dtype=dtype)
    wide[:, 1:21:2] = v.to(dtype)
    view = wide[:, 1:21:2]
    transposed = u.to(dtype).T.contiguous().T
    one = policy_terms(transposed, view, action, backend="cpu")
    two = policy_terms(u.to(dtype), v.to(dtype), action, backend="cpu")
    assert torch.equal(one.log_prob, two.log_prob)
    offset = torch.cat([torch.zeros(1, dtype=dtype), v.to(dtype).flatten()])[1:].view(40, 10)
    assert torch.equal(policy_terms(u.to(dtype), offset, action).log_prob, two.log_prob)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    u, v, action = operands(5, 30, 4)
    e, t = torch.rand(5, 3, dtype=dtype), torch.rand(30, 3, dtype=dtype)
    u, v, b = (x.to(dtype).requires_grad_() for x in (u, v, torch.rand(30)))
    x = Operands(u, v, action, 0.7, b, RewardOperands(context=e, item=t, sigmoid=True))
    torch.library.opcheck(policy_terms_op, (True, "cpu", *policy_arguments(x)))


def test_compiled_and_used_twice() -> None:
    """One graph, and a second use of the same terms, as with two losses."""
    u, v, action = operands(70, 300, 12)

    def losses(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        terms = policy_terms(u, v, action, entropy=True)
        assert terms.entropy is not None
        return terms.log_prob.square().sum(), terms.entropy.sum()

    gradients = []
    for call in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        x, y = u.clone().requires_grad_(), v.clone().requires_grad_()
        one, two = call(x, y)
        one.backward(retain_graph=True)
        two.backward()
        gradients.append((x.grad, y.grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_second_derivatives_raise() -> None:
    u, v, action = operands(4, 9, 3)
    x = u.requires_grad_()
    (first,) = torch.autograd.grad(policy_terms(x, v, action).log_prob.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        first.square().sum().backward()


def test_autocast_takes_mixed_dtypes_and_rounds_nothing() -> None:
    u, v, action = operands(6, 20, 4)
    half = u.bfloat16()
    with pytest.raises(OperatorError, match="give both one dtype"):
        policy_terms(half, v, action)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = policy_terms(half, v, action)
        same = policy_terms(half, v.bfloat16(), action)
    assert torch.equal(mixed.log_prob, policy_terms(half.float(), v, action).log_prob)
    assert torch.equal(same.log_prob, policy_terms(half, v.bfloat16(), action).log_prob)


def test_cotangents_of_any_size_and_stride() -> None:
    """Zero, huge, tiny, and an expanded scalar (stride 0); each row has its own error bound."""
    u, v, action = operands(5, 300, 8)
    weight = torch.tensor([0.0, 1e20, -1e-20, 1.0, 3.0])
    x, y = u.clone().requires_grad_(), v.clone().requires_grad_()
    policy_terms(x, y, action).log_prob.backward(weight)
    a, b = u.double().requires_grad_(), v.double().requires_grad_()
    policy_terms(a, b, action).log_prob.backward(weight.double())
    assert x.grad is not None and a.grad is not None and y.grad is not None and b.grad is not None
    error = (x.grad.double() - a.grad).norm(dim=1)
    assert (error <= 1e-5 * a.grad.norm(dim=1)).all()
    assert (y.grad.double() - b.grad).norm() <= 1e-5 * b.grad.norm()
    x.grad = None
    policy_terms(x, y, action).log_prob.sum().backward()
    a.grad = None
    policy_terms(a, b, action).log_prob.sum().backward()
    torch.testing.assert_close(x.grad.double(), a.grad, rtol=1e-5, atol=1e-5)


def test_many_rows_of_one_item() -> None:
    """All rows have one action: the sparse part of its gradient is as long as possible."""
    u, v, _ = operands(3000, 100, 8)
    action = torch.full((3000,), 41)
    y, b = v.clone().requires_grad_(), v.double().requires_grad_()
    policy_terms(u, y, action).log_prob.sum().backward()
    policy_terms(u.double(), b, action).log_prob.sum().backward()
    assert y.grad is not None and b.grad is not None
    assert (y.grad.double() - b.grad).norm() <= 1e-5 * b.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_items_merge_to_the_whole(dtype: torch.dtype) -> None:
    u, v, action = operands(70, 1000, 12)
    u, v = u.to(dtype), v.to(dtype)
    e, t = torch.rand(70, 3).to(dtype), torch.rand(1000, 3).to(dtype)
    parts = [
        partial_terms(
            u,
            v[start:stop],
            torch.where((action >= start) & (action < stop), action - start, -1),
            reward_model=FactoredReward(e, t[start:stop], link="sigmoid"),
            entropy=True,
            backend="cpu",
        )
        for start, stop in ((0, 1), (1, 400), (400, 1000))
    ]
    reward = FactoredReward(e, t, link="sigmoid")
    whole = policy_terms(u, v, action, reward_model=reward, entropy=True)
    for order in (parts, parts[::-1]):
        merged = merge_partials(order).finish()
        for name in ("log_prob", "log_normalizer", "expected_reward", "action_reward", "entropy"):
            torch.testing.assert_close(
                getattr(merged, name), getattr(whole, name), rtol=1e-6, atol=2e-6
            )


def test_memory_of_large_gradients_is_used_again() -> None:
    """Gradients that live at once have memory of their own; a view keeps that of its gradient."""
    u, v, action = operands(2, 600_000, 16)
    x = v.requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad(policy_terms(u, x, action).log_prob.sum(), x)[0]

    first, second = gradient(), gradient()
    assert torch.equal(first, second)
    assert len({first.data_ptr(), second.data_ptr()}) == 2
    address, view = first.data_ptr(), first[7:]
    expected = view.clone()
    del first
    third = gradient()
    assert third.data_ptr() != address
    assert torch.equal(view, expected)
    del view
    assert gradient().data_ptr() == address


def test_empty_batches() -> None:
    u, v, _ = operands(0, 9, 3)
    action = torch.zeros(0, dtype=torch.int64)
    x, y = u.requires_grad_(), v.requires_grad_()
    terms = policy_terms(x, y, action, entropy=True)
    assert terms.log_prob.shape == (0,)
    terms.log_prob.sum().backward()
    assert y.grad is not None and not y.grad.any()
    scores, index = top_k(u.detach(), v.detach(), 2)
    assert scores.shape == index.shape == (0, 2)


def test_more_rows_than_a_16_bit_number() -> None:
    """65,537 rows, three items: equal contexts give equal terms."""
    u = torch.randn(1, 4).expand(65_537, 4).contiguous()
    v = torch.randn(3, 4)
    action = torch.zeros(65_537, dtype=torch.int64)
    terms = policy_terms(u, v, action)
    assert (terms.log_prob == terms.log_prob[0]).all()
    exact = torch.log_softmax(u[:1].double() @ v.double().T, 1)[0, 0]
    assert abs(float(terms.log_prob[-1]) - float(exact)) < 1e-6


def test_signals_that_raise_nothing_change_nothing() -> None:
    """A handler that returns lets the call go on."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    u, v, action = operands(256, 100_000, 32)
    before = signal.signal(signal.SIGALRM, count)
    try:
        quiet = policy_terms(u, v, action).log_prob
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            assert torch.equal(policy_terms(u, v, action).log_prob, quiet)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls > 0
