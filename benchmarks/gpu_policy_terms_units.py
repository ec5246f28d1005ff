"""The units of gpu_policy_terms.py, by name.

    check FAMILY DTYPE KIND          a kernel family against float64
    ceilings                         matrix product and copy rates of the device
    time d=D B=B CASE                kernels for this device and portable ones, interleaved; then
                                     this device's back to back, with the clock meanwhile
    bias d=D B=B CASE                with and without item biases, interleaved
    portable d=D B=B CASE            portable kernels alone
    peer d=D B=B CASE: PEER          another implementation and offtower, interleaved
    memory d=D B=B                   peak memory of the cases beyond their operands
    test NAME [DTYPE] [BxNxD]        a test of tests/ops/test_cuda.py

A rehearsal runs them on a CPU to test the script; its figures mean nothing.
"""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_policy_terms_peers import peers_of

Call = Callable[[], Any]
Keep = Callable[[dict[str, Any]], None]

SLEEP_CYCLES = 4_000_000  # some 2 ms
SUSTAINED_MS = 300
CASES = (
    "log_prob forward",
    "+ expected_reward forward",
    "log_prob forward+backward",
    "DR identity forward+backward",
    "DR sigmoid forward+backward",
)
FAMILIES = {"own": "", "portable": "portable"}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHECKED = ((1, 1, 1), (17, 513, 33), (300, 5000, 64), (130, 3000, 128), (70, 900, 250))


class Bench:
    """Run units on one device; a rehearsal uses the CPU and small sizes."""

    def __init__(self, rehearsal: bool) -> None:
        self.rehearsal = rehearsal
        self.device = "cpu" if rehearsal else "cuda"
        self.items = 2_000 if rehearsal else 1_000_000
        self.rounds = 2 if rehearsal else 15
        self.operands = functools.lru_cache(1)(self._operands)

    def run(self, name: str, keep: Keep) -> dict[str, Any]:
        kind, _, rest = name.partition(" ")
        if kind == "check":
            return self._check(*rest.split())
        if kind == "ceilings":
            return self._ceilings()
        if kind == "test":
            return self._test(*rest.split())
        shape, case = rest.split(" ", 2)[:2], " ".join(rest.split(" ", 2)[2:])
        dim, rows = (int(part.partition("=")[2]) for part in shape)
        x = self.operands(dim, max(1, rows // 64) if self.rehearsal else rows)
        if kind == "memory":
            return {"mib": {c: self._peak_memory(self._ours(x)[c]) for c in CASES}}
        if kind == "time":
            return self._time(x, case, keep)
        if kind == "bias":
            calls = {"without": self._ours(x)[case], "with": self._ours(x, biases=True)[case]}
            return {"ms": self._median_ms(calls, self.rounds)}
        if kind == "portable":
            call = self._ours(x, "portable")[case]
            return {"ms": self._median_ms({"portable": call}, self.rounds)}
        return self._peer(x, case, keep)

    def _check(self, family: str, dtype: str, kind: str) -> dict[str, Any]:
        """Compare with float64; raise at the first shape whose error exceeds its bound."""
        from tests.ops.cases import check_errors

        torch.backends.cuda.matmul.fp32_precision = "ieee"
        os.environ["OFFTOWER_CUDA_KERNELS"] = FAMILIES[family]
        backend: Any = "reference" if self.rehearsal else "cuda"
        for shape in CHECKED[:2] if self.rehearsal else CHECKED:
            check_errors(
                shape, kind, DTYPES[dtype], 1.0, lambda case: case.native(backend),
                seeds=range(2), device=self.device, roundings=2,
            )  # fmt: skip
        return {"shapes": len(CHECKED)}

    def _test(self, name: str, *given: str) -> dict[str, Any]:
        from tests.ops import test_cuda

        os.environ["OFFTOWER_CUDA_KERNELS"] = ""
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        test = getattr(test_cuda, name)
        values = [DTYPES.get(g) or tuple(int(n) for n in g.split("x")) for g in given]
        if not self.rehearsal:
            test(*values)
        return {}

    def _ceilings(self) -> dict[str, Any]:
        """Measure a square bfloat16 product and a copy of random data."""
        n, numbers = (64, 1 << 12) if self.rehearsal else (8192, 1 << 29)
        a, b = (torch.randn(n, n, device=self.device).bfloat16() for _ in range(2))
        big = torch.randn(numbers, device=self.device)
        out = torch.empty_like(big)
        ms = self._median_ms({"product": lambda: a @ b, "copy": lambda: out.copy_(big)}, 12)
        return {
            "product_tflops": 2 * n**3 / ms["product"] / 1e9,
            "copy_tbps": 2 * big.nbytes / ms["copy"] / 1e9,
        }

    def _median_ms(self, calls: dict[str, Call], rounds: int) -> dict[str, float]:
        """Return median milliseconds of interleaved calls; the first two rounds are warm-up.

        The device sleeps before each call, so that the host has queued the whole call before the
        first event is reached and only device time is measured.
        """
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 2):
            for name, call in calls.items():
                took = self._once(call)
                if turn > 1:
                    times[name].append(took)
        return {name: statistics.median(t) for name, t in times.items()}

    def _once(self, call: Call) -> float:
        if self.rehearsal:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def _operands(self, dim: int, rows: int) -> Operands:
        return Operands(self.device, rows, self.items, dim)

    def _ours(self, x: Operands, family: str = "own", biases: bool = False) -> dict[str, Call]:
        from offtower.ops import FactoredReward, policy_terms

        backend: Any = "reference" if self.rehearsal else "cuda"

        def terms(link: str | None = None) -> Any:
            os.environ["OFFTOWER_CUDA_KERNELS"] = FAMILIES[family]
            reward = None if link is None else FactoredReward(x.e, x.t, link=link)  # type: ignore[arg-type]
            bias = x.bias if biases else None
            return policy_terms(
                x.u, x.v, x.action, item_bias=bias, reward_model=reward, backend=backend
            )

        @torch.no_grad()
        def forward(link: str | None = None) -> None:
            terms(link)

        def backward(link: str | None = None) -> None:
            t = terms(link)
            loss = t.log_prob.mean() if link is None else (t.log_prob + t.expected_reward).mean()
            torch.autograd.grad(loss, (x.u, x.v))

        calls = (
            forward,
            lambda: forward("identity"),
            backward,
            lambda: backward("identity"),
            lambda: backward("sigmoid"),
        )
        return dict(zip(CASES, calls, strict=True))

    def _time(self, x: Operands, case: str, keep: Keep) -> dict[str, Any]:
        own = self._ours(x)[case]
        keep({"ms": self._median_ms({"own": own}, self.rounds)})
        sustained = self._sustained(own)
        keep(sustained)
        if not self.rehearsal and torch.cuda.get_device_capability()[0] != 9:
            return sustained  # this device has only portable kernels
        both = {"own": own, "portable": self._ours(x, "portable")[case]}
        return {"ms": self._median_ms(both, self.rounds), **sustained}

    def _sustained(self, call: Call) -> dict[str, Any]:
        """Time calls back to back: the clock falls under load, which single calls do not show."""
        if self.rehearsal:
            return {}
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        count = max(20, int(SUSTAINED_MS / self._once(call)))
        start.record()
        for _ in range(count):
            call()
        stop.record()
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,power.draw"]
        done = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True
        )
        stop.synchronize()
        return {
            "back_to_back_ms": start.elapsed_time(stop) / count,
            "sm_mhz, max_sm_mhz, watts": done.stdout.strip(),
        }

    def _peer(self, x: Operands, name: str, keep: Keep) -> dict[str, Any]:
        case = name.partition(":")[0]
        if not self.rehearsal:
            torch.cuda.empty_cache()  # peers check free memory before they allocate
        call = peers_of(x)[name]()
        call()
        calls = {"own": self._ours(x)[case], "peer": call}
        return {"ms": self._median_ms(calls, 2 if self.rehearsal else 4)}

    def _peak_memory(self, call: Call) -> float:
        """Return the peak MiB of a call beyond the memory allocated before it."""
        if self.rehearsal:
            call()
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


class Operands:
    """u (B, d), v (N, d), e, t of the reward model likewise, action (B,)."""

    def __init__(self, device: str, rows: int, items: int, dim: int) -> None:
        torch.manual_seed(0)

        def make(n: int) -> Tensor:
            return (torch.randn(n, dim, device=device) * dim**-0.25).bfloat16()

        self.u, self.v = make(rows).requires_grad_(), make(items).requires_grad_()
        self.e, self.t = make(rows), make(items)
        self.bias = torch.randn(items, device=device).bfloat16()
        self.action = torch.randint(0, items, (rows,), device=device)


def spoils(error: Exception) -> bool:
    """Return whether the error leaves the CUDA context unusable, as an illegal access does."""
    del error
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        return int(torch.ones(1, device="cuda").sum()) != 1
    except Exception:
        return True
