"""The fused operators against the machine's limits and against other ways to the same terms.

    python benchmarks/policy_terms.py --json policy_terms.json            # shares of the limits
    python benchmarks/policy_terms.py --peers --json peers.json           # beside other people's
    python benchmarks/policy_terms.py --growth --json growth.json         # with N and with d
    python benchmarks/policy_terms.py --memory --json memory.json         # peak memory of a step

Only the needed work is counted: 2BNd for log_prob forward, 8BNd with its backward, 12BNd for DR
with a factored reward of the same width (exponentials and sigmoids are not counted). It is divided
by two rates of the same run: a loop of the widest multiply-adds in registers on all threads, and
torch's best square matrix product in that dtype. Variants take turns in one process; medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
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


def medians(calls: dict[str, Callable[[], None]], x: Operands, repeats: int) -> dict[str, float]:
    """Seconds; every call once a round, the first round uncounted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            x.clear()
            begin = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t) for name, t in times.items()}


def limits(dtype: str) -> dict[str, float]:
    """Operations a second: registers alone, and torch's best square product."""
    code = list(DTYPES).index(dtype)
    threads = torch.get_num_threads()
    registers = max(_cpu.multiply_add_rate(code, threads) for _ in range(3))
    best = 0.0
    for n in (1024, 2048, 4096):
        a, b = (torch.randn(n, n).to(DTYPES[dtype]) for _ in range(2))
        for _ in range(4):
            begin = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return {"registers": registers, "square product": best}


def shares(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for dtype in arguments.dtype:
        for rows in arguments.rows:
            for items in arguments.items:
                for dim in arguments.dim:
                    limit = limits(dtype)
                    x = Operands(rows, items, dim, DTYPES[dtype])
                    took = medians(calls_of_ours(x), x, arguments.repeats)
                    for name, seconds in took.items():
                        rate = WORK[name] * rows * items * dim / seconds
                        found.append(
                            {
                                "case": name, "dtype": dtype, "rows": rows, "items": items,
                                "dim": dim, "milliseconds": seconds * 1e3, "gflops": rate / 1e9,
                                "share of registers": rate / limit["registers"],
                                "share of square product": rate / limit["square product"],
                            }
                        )  # fmt: skip
    return found


def against_peers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for dtype in arguments.dtype:
        for rows in arguments.rows:
            for items in arguments.items:
                for dim in arguments.dim:
                    gib = 4 * rows * items * 4 / 2**30  # eager's logits, their softmax, gradients
                    x = Operands(rows, items, dim, DTYPES[dtype])
                    forward: dict[str, Callable[[], None]] = {}
                    both: dict[str, Callable[[], None]] = {}
                    for name, peer in {**peers(), "bare product": bare_product}.items():
                        if gib > arguments.gib and not name.startswith(("chunked", "compiled")):
                            continue  # would not fit; said in the table by its absence
                        forward[name] = _without_gradient(peer, x)
                        if peer is not bare_product:
                            both[name] = _with_gradient(peer, x)
                    forward["attention"] = _without_gradient(attention, x)
                    ours = calls_of_ours(x)
                    forward["offtower"] = ours["log_prob forward"]
                    both["offtower"] = ours["log_prob forward+backward"]
                    for case, calls in (("forward", forward), ("forward+backward", both)):
                        took = medians(calls, x, arguments.repeats)
                        for name, seconds in took.items():
                            found.append(
                                {
                                    "case": case, "dtype": dtype, "rows": rows, "items": items,
                                    "dim": dim, "variant": name, "milliseconds": seconds * 1e3,
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
    """B = 256: with N at d = 64, and with d at N = 200,000."""
    sizes = [(n, 64) for n in (10_000, 100_000, 1_000_000, 10_000_000)]
    sizes += [(200_000, d) for d in (16, 32, 48, 64, 100, 128, 256)]
    found = []
    for dtype in arguments.dtype:
        limit = limits(dtype)
        for items, dim in sizes:
            x = Operands(256, items, dim, DTYPES[dtype])
            calls = calls_of_ours(x)
            if items > 2_000_000:
                calls.pop("DR forward+backward")
            for name, seconds in medians(calls, x, arguments.repeats).items():
                rate = WORK[name] * 256 * items * dim / seconds
                found.append(
                    {
                        "case": name, "dtype": dtype, "rows": 256, "items": items, "dim": dim,
                        "milliseconds": seconds * 1e3, "gflops": rate / 1e9,
                        "share of registers": rate / limit["registers"],
                    }
                )  # fmt: skip
    return found


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak of one step beyond its inputs and outputs, each variant in a process of its own."""
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(x)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    outputs = (x.u.numel() + x.v.numel()) * 4
    return (peak * 1024 - outputs) / 2**20


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
    parser.add_argument("--gib", type=float, default=6.0, help="peers that need more are left out")
    parser.add_argument("--peers", action="store_true")
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
            "limits": {name: limits(name) for name in arguments.dtype}, "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
