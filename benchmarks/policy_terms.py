"""The fused operators on a CPU, compared with hardware limits and other implementations.

    python benchmarks/policy_terms.py --json policy_terms.json            # fractions of the limits
    python benchmarks/policy_terms.py --peers --json peers.json           # other implementations
    python benchmarks/policy_terms.py --growth --json growth.json         # scaling with N and d
    python benchmarks/policy_terms.py --memory --json memory.json         # peak memory of a step

Floating point operations are counted as 2BNd for log_prob forward, 8BNd with its backward, and
12BNd for DR with a factored reward of the same width, without exponentials and sigmoids. Their rate
is divided by two rates of the same run: multiply-adds in registers on all threads, and torch's
best square matrix product in that dtype. Variants are interleaved in one process; figures are
medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from offtower.ops import FactoredReward, _cpu, available_instruction_sets, policy_terms
from policy_terms_peers import attention, bare_product, peers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WORK = {"log_prob forward": 2, "log_prob forward+backward": 8, "DR forward+backward": 12}


class Operands:
    def __init__(self, rows: int, items: int, dim: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        scale = dim**-0.25  # logits of variance 1

        def make(*shape: int) -> Tensor:
            return (torch.randn(*shape) * scale).to(dtype)

        self.u, self.v = make(rows, dim).requires_grad_(), make(items, dim).requires_grad_()
        self.action = torch.randint(0, items, (rows,))
        self.reward = FactoredReward(make(rows, dim), make(items, dim), link="sigmoid")

    def clear(self) -> None:
        self.u.grad = self.v.grad = None


def calls_of_ours(x: Operands) -> dict[str, Callable[[], None]]:
    def forward() -> None:
        with torch.no_grad():
            policy_terms(x.u, x.v, x.action)

    def backward() -> None:
        policy_terms(x.u, x.v, x.action).log_prob.mean().backward()

    def doubly_robust() -> None:
        t = policy_terms(x.u, x.v, x.action, reward_model=x.reward)
        assert t.expected_reward is not None
        (t.log_prob + t.expected_reward).mean().backward()

    return dict(zip(WORK, (forward, backward, doubly_robust), strict=True))


def rounds(
    calls: dict[str, Callable[[], None]], x: Operands, repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of every call in each round, without a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            x.clear()
            begin = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return times


def medians(calls: dict[str, Callable[[], None]], x: Operands, repeats: int) -> dict[str, float]:
    return {name: statistics.median(t) for name, t in rounds(calls, x, repeats).items()}


class Limits:
    """The two limiting rates, measured in every round because clock rates change."""

    SIZE = 2048

    def __init__(self, dtype: str) -> None:
        self._code = list(DTYPES).index(dtype)
        self._a, self._b = (torch.randn(self.SIZE, self.SIZE).to(DTYPES[dtype]) for _ in range(2))
        self.registers: list[float] = []
        self.square: list[float] = []

    def calls(self) -> dict[str, Callable[[], None]]:
        def registers() -> None:
            self.registers.append(_cpu.multiply_add_rate(self._code, torch.get_num_threads()))

        def square() -> None:
            begin = time.perf_counter()
            self._a @ self._b
            self.square.append(2 * self.SIZE**3 / (time.perf_counter() - begin))

        return {"registers": registers, "square": square}

    def shares(self, work: float, times: list[float]) -> dict[str, float]:
        """Return the medians over rounds of rate / limit."""
        counted = len(times)
        return {
            name: statistics.median(
                work / t / limit for t, limit in zip(times, limits[-counted:], strict=True)
            )
            for name, limits in (
                ("share of registers", self.registers),
                ("share of square product", self.square),
            )
        }


def shares(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    sizes = itertools.product(arguments.rows, arguments.items, arguments.dim)
    return [
        case
        for dtype, (rows, items, dim) in itertools.product(arguments.dtype, list(sizes))
        for case in _shares(dtype, rows, items, dim, arguments.repeats)
    ]


def _shares(dtype: str, rows: int, items: int, dim: int, repeats: int) -> list[dict[str, Any]]:
    x, limits = Operands(rows, items, dim, DTYPES[dtype]), Limits(dtype)
    calls = calls_of_ours(x)
    if items > 2_000_000:
        calls.pop("DR forward+backward")  # needs two more arrays of items x dim
    times = rounds({**limits.calls(), **calls}, x, repeats)
    found = []
    for name in calls:
        work = WORK[name] * rows * items * dim
        seconds = statistics.median(times[name])
        found.append(
            {
                "case": name, "dtype": dtype, "rows": rows, "items": items, "dim": dim,
                "milliseconds": seconds * 1e3, "gflops": work / seconds / 1e9,
                **limits.shares(work, times[name]),
            }
        )  # fmt: skip
    return found


def against_peers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    sizes = itertools.product(arguments.rows, arguments.items, arguments.dim)
    return [
        case
        for dtype, (rows, items, dim) in itertools.product(arguments.dtype, list(sizes))
        for case in _against_peers(dtype, rows, items, dim, arguments)
    ]


def _against_peers(
    dtype: str, rows: int, items: int, dim: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    x = Operands(rows, items, dim, DTYPES[dtype])
    matrix_gib = 4 * rows * items * 4 / 2**30  # logits, their softmax, and both gradients
    fits = {
        name: peer
        for name, peer in peers().items()
        if name not in arguments.without
        and (matrix_gib <= arguments.gib or name.startswith(("chunked", "compiled")))
    }
    ours = calls_of_ours(x)
    forward = {name: _without_gradient(peer, x) for name, peer in fits.items()}
    forward["attention"] = _without_gradient(attention, x)
    if matrix_gib <= arguments.gib:
        forward["bare product"] = _without_gradient(bare_product, x)
    forward["offtower"] = ours["log_prob forward"]
    both = {name: _with_gradient(peer, x) for name, peer in fits.items()}
    both["offtower"] = ours["log_prob forward+backward"]
    found = []
    for case, calls in (("forward", forward), ("forward+backward", both)):
        took = medians(calls, x, arguments.repeats)
        for name, seconds in took.items():
            found.append(
                {
                    "case": case, "dtype": dtype, "rows": rows, "items": items, "dim": dim,
                    "variant": name, "milliseconds": seconds * 1e3,
                    "times ours": seconds / took["offtower"],
                }
            )  # fmt: skip
    return found


def _without_gradient(peer: Callable[..., Tensor], x: Operands) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            peer(x.u, x.v, x.action)

    return call


def _with_gradient(peer: Callable[..., Tensor], x: Operands) -> Callable[[], None]:
    return lambda: peer(x.u, x.v, x.action).backward()


def growth(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure B = 256 for several N at d = 64, and for several d at N = 200,000."""
    sizes = [(n, 64) for n in (10_000, 100_000, 1_000_000, 10_000_000)]
    sizes += [(200_000, d) for d in (16, 32, 48, 64, 100, 128, 256)]
    return [
        case
        for dtype, (items, dim) in itertools.product(arguments.dtype, sizes)
        for case in _shares(dtype, 256, items, dim, arguments.repeats)
    ]


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the peak memory of a step beyond its inputs and outputs, one process per variant."""
    found = []
    for variant in ("offtower", "offtower DR", "eager"):
        done = subprocess.run(
            [sys.executable, __file__, "--memory-of", variant],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(
            {
                "variant": variant,
                "rows": 512,
                "items": 500_000,
                "dim": 64,
                "MiB": float(done.stdout),
            }
        )
    for row in found:
        row["times eager's"] = row["MiB"] / found[-1]["MiB"]
    return found


def memory_of(variant: str) -> float:
    x = Operands(512, 500_000, 64, torch.float32)
    small = Operands(8, 100, 64, torch.float32)
    step = {
        "offtower": lambda y: calls_of_ours(y)["log_prob forward+backward"](),
        "offtower DR": lambda y: calls_of_ours(y)["DR forward+backward"](),
        "eager": lambda y: peers()["eager"](y.u, y.v, y.action).backward(),
    }[variant]
    step(small)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident memory
    before = _status("VmRSS")
    step(x)
    outputs = (x.u.numel() + x.v.numel()) * 4
    return (_status("VmHWM") - before - outputs) / 2**20


def _status(name: str) -> int:
    """Return the bytes of an entry in /proc/self/status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--items", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gib", type=float, default=6.0, help="skip peers that need more memory")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--without", nargs="+", default=[], help="peers to skip")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(memory_of(arguments.memory_of))
        return
    run = (
        against_peers if arguments.peers
        else growth if arguments.growth
        else memory if arguments.memory
        else shares
    )  # fmt: skip
    rows = run(arguments)
    show(rows)
    if arguments.json:
        facts = {
            "machine": platform.machine(), "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "instruction set": available_instruction_sets()[0],
            "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
