"""The fused operators on a CPU, compared with hardware limits and other implementations.

    python benchmarks/policy_terms.py --json policy_terms.json            # fractions of the limits
    python benchmarks/policy_terms.py --peers --json peers.json           # other implementations
    python benchmarks/policy_terms.py --growth --json growth.json         # scaling with N and d
    python benchmarks/policy_terms.py --memory --json memory.json         # peak memory of a step

Floating point operations are counted as 2BNd for log_prob forward, 8BNd with its backward, and
12BNd for DR with a factored reward of the same width, without exponentials and sigmoids. Their rate
is divided by two rates of the same run: multiply-adds in registers on all threads, and torch's
best square matrix product in that dtype. Variants are interleaved in one process; figures are
medians. Other implementations are timed at a small size first: one that would take more than
`--limit` seconds a call is skipped, with a line that says so (torch's bfloat16 product does on CPUs
without AVX-512). Results are printed, and written as JSON, after each case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offtower.ops import FactoredReward, _cpu, available_instruction_sets, policy_terms
from policy_terms_peers import Peer, attention, bare_product, peers

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


@dataclass(frozen=True)
class Case:
    dtype: str
    rows: int
    items: int
    dim: int

    @property
    def products(self) -> int:
        return self.rows * self.items * self.dim

    @property
    def size(self) -> str:
        return f"B={self.rows:,}, N={self.items:,}, d={self.dim}"

    def operands(self) -> Operands:
        return Operands(self.rows, self.items, self.dim, DTYPES[self.dtype])


Row = dict[str, Any]
Wrap = Callable[[Peer, Operands], Callable[[], None]]


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


def seconds_of(call: Callable[[], None]) -> float:
    """Return the seconds of a second call, after one that may compile or allocate."""
    call()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def seconds_at_size(call_at: Callable[[int], Callable[[], None]], size: int, most: float) -> float:
    """Estimate the seconds of a call at `size` from smaller calls, whose time grows with it.

    Sizes grow eightfold from 4,096 until the estimate is at most `most` or a call takes 0.5 s.
    """
    tried = min(4096, size)
    while True:
        took = seconds_of(call_at(tried))
        estimate = took * size / tried
        if estimate <= most or took > 0.5 or tried == size:
            return estimate
        tried = min(8 * tried, size)


class Limits:
    """The two limiting rates, measured in every round because clock rates change."""

    SIZE = 2048

    def __init__(self, dtype: str, most: float) -> None:
        self._code = list(DTYPES).index(dtype)
        self._a, self._b = (torch.randn(self.SIZE, self.SIZE).to(DTYPES[dtype]) for _ in range(2))
        self.registers: list[float] = []
        self.square: list[float] = []
        estimate = seconds_at_size(
            lambda n: lambda: self._product(n // self.SIZE), self.SIZE**2, most
        )
        self._has_square = estimate <= most
        if not self._has_square:
            say(f"no square product in {dtype}: it would take some {estimate:.0f} s")

    def _product(self, rows: int) -> None:
        self._a[:rows] @ self._b

    def calls(self) -> dict[str, Callable[[], None]]:
        def registers() -> None:
            self.registers.append(_cpu.multiply_add_rate(self._code, torch.get_num_threads()))

        def square() -> None:
            begin = time.perf_counter()
            self._product(self.SIZE)
            self.square.append(2 * self.SIZE**3 / (time.perf_counter() - begin))

        return {"registers": registers, **({"square": square} if self._has_square else {})}

    def shares(self, work: float, times: list[float]) -> dict[str, float | None]:
        """Return the medians over rounds of rate / limit, None where the limit was not measured."""
        counted = len(times)
        return {
            name: statistics.median(
                work / t / limit for t, limit in zip(times, limits[-counted:], strict=True)
            )
            if limits
            else None
            for name, limits in (
                ("share of registers", self.registers),
                ("share of square product", self.square),
            )
        }


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    sizes = list(itertools.product(arguments.rows, arguments.items, arguments.dim))
    for dtype, (rows, items, dim) in itertools.product(arguments.dtype, sizes):
        yield Case(dtype, rows, items, dim)


def shares(arguments: argparse.Namespace) -> Iterator[Row]:
    for case in cases(arguments):
        yield from _shares(case, arguments)


def _shares(case: Case, arguments: argparse.Namespace) -> Iterator[Row]:
    x, limits = case.operands(), Limits(case.dtype, arguments.limit)
    calls = calls_of_ours(x)
    if case.items > 2_000_000:
        calls.pop("DR forward+backward")  # needs two more arrays of items x dim
    times = rounds({**limits.calls(), **calls}, x, arguments.repeats)
    for name in calls:
        work = WORK[name] * case.products
        seconds = statistics.median(times[name])
        yield {
            "case": name, **asdict(case), "milliseconds": seconds * 1e3,
            "gflops": work / seconds / 1e9, **limits.shares(work, times[name]),
        }  # fmt: skip


def against_peers(arguments: argparse.Namespace) -> Iterator[Row]:
    for case in cases(arguments):
        yield from _against_peers(case, arguments)


def _against_peers(case: Case, arguments: argparse.Namespace) -> Iterator[Row]:
    x = case.operands()
    matrix_gib = 4 * case.rows * case.items * 4 / 2**30  # logits, their softmax, both gradients
    whole = matrix_gib <= arguments.gib  # whether an array of rows x items fits
    both = {
        name: peer
        for name, peer in peers().items()
        if name not in arguments.without and (whole or name.startswith(("chunked", "compiled")))
    }
    forward = {**both, "attention": attention, **({"bare product": bare_product} if whole else {})}
    ours = calls_of_ours(x)
    for name, found, wrap in (
        ("log_prob forward", forward, _without_gradient),
        ("log_prob forward+backward", both, _with_gradient),
    ):
        limits = Limits(case.dtype, arguments.limit)
        calls = {
            peer_name: wrap(peer, x)
            for peer_name, peer in found.items()
            if _is_quick(f"{name} of {peer_name}", peer, wrap, case, arguments.limit)
        }
        calls |= {"offtower": ours[name], "registers": limits.calls()["registers"]}
        times = rounds(calls, x, arguments.repeats)
        del times["registers"]
        work = WORK[name] * case.products
        for variant, took in times.items():
            yield {
                "case": name, **asdict(case), "variant": variant,
                "milliseconds": statistics.median(took) * 1e3,
                "times ours": statistics.median(took) / statistics.median(times["offtower"]),
                "share of registers": limits.shares(work, took)["share of registers"],
            }  # fmt: skip


def _is_quick(name: str, peer: Peer, wrap: Wrap, case: Case, most: float) -> bool:
    """Whether a call runs and takes at most `most` seconds; if not, says so.

    Probes have at most 64 rows.
    """
    rows = min(case.rows, 64)

    def call_at(items: int) -> Callable[[], None]:
        return wrap(peer, replace(case, rows=rows, items=items).operands())

    try:
        estimate = seconds_at_size(call_at, case.items, most * rows / case.rows) * case.rows / rows
    except RuntimeError as error:
        say(f"skipping {name} in {case.dtype}: {str(error).splitlines()[0]}")
        return False
    if estimate > most:
        say(f"skipping {name} in {case.dtype}: some {estimate:.0f} s a call at {case.size}")
    return estimate <= most


def _without_gradient(peer: Peer, x: Operands) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            peer(x.u, x.v, x.action)

    return call


def _with_gradient(peer: Peer, x: Operands) -> Callable[[], None]:
    return lambda: peer(x.u, x.v, x.action).backward()


def growth(arguments: argparse.Namespace) -> Iterator[Row]:
    """Measure B = 256 for several N at d = 64, and for several d at N = 200,000."""
    sizes = [(n, 64) for n in (10_000, 100_000, 1_000_000, 10_000_000)]
    sizes += [(200_000, d) for d in (16, 32, 48, 64, 100, 128, 256)]
    for dtype, (items, dim) in itertools.product(arguments.dtype, sizes):
        yield from _shares(Case(dtype, 256, items, dim), arguments)


def memory(arguments: argparse.Namespace) -> Iterator[Row]:
    """Measure the peak memory of a step beyond its inputs and outputs, one process per variant."""
    for variant in ("offtower", "offtower DR", "eager"):
        done = subprocess.run(
            [sys.executable, __file__, "--memory-of", variant],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        mib = float(done.stdout)
        yield {"variant": variant, "rows": 512, "items": 500_000, "dim": 64, "MiB": mib}


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


class Report:
    """Prints rows as they come, and writes all of them to a JSON file after each."""

    def __init__(self, facts: dict[str, Any], path: Path | None) -> None:
        self._facts, self._path = facts, path
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        if not self._rows:
            say("  ".join(self._cell(name, name, row[name]) for name in row))
        self._rows.append(row)
        say("  ".join(self._cell(name, value, value) for name, value in row.items()))
        if self._path:
            self._path.write_text(json.dumps({**self._facts, "rows": self._rows}, indent=1))

    @staticmethod
    def _cell(name: str, shown: object, like: object) -> str:
        text = f"{shown:.3g}" if isinstance(shown, float) else "-" if shown is None else str(shown)
        if isinstance(like, str):
            return text.ljust(30 if name == "variant" else 25 if name == "case" else 8)
        return text.rjust(max(len(name), 7))


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--items", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gib", type=float, default=6.0, help="skip peers that need more memory")
    parser.add_argument(
        "--limit", type=float, default=20.0, help="skip peers that take more seconds a call"
    )
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
    facts = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instruction set": os.environ.get("OFFTOWER_CPU_ISA") or available_instruction_sets()[0],
    }
    report = Report(facts, arguments.json)
    for row in run(arguments):
        report.add(row)


if __name__ == "__main__":
    main()
