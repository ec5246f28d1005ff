"""The operators on an NVIDIA GPU: build, check, and time them beside other ways to the same terms.

    python3 benchmarks/gpu_policy_terms.py --json gpu.json           # all, in under 8 minutes
    python3 benchmarks/gpu_policy_terms.py --only d64              # d = 64 alone
    python3 benchmarks/gpu_policy_terms.py --no-peers

Builds the CUDA core in place with nvcc, against the Python and torch that run it, offline, unless
--no-build. Then every kernel is compared with float64. Then bfloat16 with N = 1e6 random items:
variants take turns, CUDA events, medians. A peer that is not installed, has no memory or no time
left says so. A short table comes last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT), str(ROOT / "csrc/cuda"), str(ROOT / "benchmarks")]

ITEMS = 1_000_000
SLEEP_CYCLES = 4_000_000  # some 2 ms
SHAPES = [(64, 1024), (128, 1024), (64, 4096), (128, 4096)]
# Milliseconds on one H200: what FlashAttention-3's efficiency predicts, and a tenth to a fifth.
GOALS = {
    "log_prob forward": (0.43, 0.58, 1.7, 2.3),
    "+ expected_reward forward": (0.58, 0.9, 2.3, 3.6),
    "log_prob forward+backward": (1.3, 2.0, 5.0, 7.8),
    "DR identity forward+backward": (1.7, 2.7, 6.6, 10.5),
    "DR sigmoid forward+backward": (2.2, 3.2, 8.6, 12.5),
}


def build() -> float:
    """Seconds it took to compile the core for this device."""
    import cuda_build

    begin = time.perf_counter()
    major, minor = torch.cuda.get_device_capability()
    architecture = "90a" if major == 9 else f"{major}{minor}"
    include = str(Path(torch.__file__).parent / "include")  # torch carries pybind11's headers
    cuda_build.build_in_place([architecture], include, ROOT / "build/gpu")
    return time.perf_counter() - begin


def check() -> list[str]:
    """Every kernel against float64; what failed."""
    from tests.ops.cases import KINDS, check_errors

    torch.backends.cuda.matmul.allow_tf32 = False
    failed = []
    for family in ("", "portable"):
        os.environ["OFFTOWER_CUDA_KERNELS"] = family
        for dtype in (torch.float32, torch.bfloat16):
            for kind in KINDS:
                for shape in (
                    (1, 1, 1),
                    (17, 513, 33),
                    (300, 5000, 64),
                    (130, 3000, 128),
                    (70, 900, 250),
                ):
                    try:
                        check_errors(
                            shape, kind, dtype, 1.0, lambda case: case.native("cuda"),
                            seeds=range(2), device="cuda", roundings=2,
                        )  # fmt: skip
                    except Exception as error:
                        failed.append(f"{family or 'own'} {dtype} {kind} {shape}: {error!r:.300}")
    os.environ["OFFTOWER_CUDA_KERNELS"] = ""
    torch.cuda.empty_cache()
    return failed


def ceilings() -> dict[str, float]:
    """The device's own rates: a square bfloat16 product and a copy, random contents."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median_time({"x": lambda: a @ b}, 12)["x"]
    big = torch.randn(1 << 29, device="cuda")
    out = torch.empty_like(big)
    copy = median_time({"x": lambda: out.copy_(big)}, 12)["x"]
    return {"product_tflops": 2 * n**3 / product / 1e9, "copy_tbps": 2 * big.nbytes / copy / 1e9}


def median_time(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds; the calls take turns, and two first rounds are not counted.

    The device sleeps a moment before each call, so that the host has queued it all by the time the
    first event is reached: what is timed is the device's work.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP_CYCLES)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            if turn > 1:
                times[name].append(start.elapsed_time(stop))
    return {name: statistics.median(t) for name, t in times.items()}


class Operands:
    def __init__(self, rows: int, dim: int) -> None:
        torch.manual_seed(0)

        def make(n: int) -> Tensor:
            return (torch.randn(n, dim, device="cuda") * dim**-0.25).bfloat16()

        self.u, self.v = make(rows).requires_grad_(), make(ITEMS).requires_grad_()
        self.e, self.t = make(rows), make(ITEMS)
        self.action = torch.randint(0, ITEMS, (rows,), device="cuda")


def ours(x: Operands, family: str = "") -> dict[str, Callable[[], Any]]:
    from offtower.ops import FactoredReward, policy_terms

    def on(family: str, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            os.environ["OFFTOWER_CUDA_KERNELS"] = family
            return call()

        return run

    def terms(link: str | None = None) -> Any:
        reward = None if link is None else FactoredReward(x.e, x.t, link=link)  # type: ignore[arg-type]
        return policy_terms(x.u, x.v, x.action, reward_model=reward, backend="cuda")

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
    return {name: on(family, call) for name, call in zip(GOALS, calls, strict=True)}


def peak_memory(call: Callable[[], Any]) -> float:
    """MiB that a call holds at most beyond what is there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(dim: int, rows: int, peers: bool, deadline: float) -> dict[str, Any]:
    from gpu_policy_terms_peers import peers_of

    x = Operands(rows, dim)
    hopper = torch.cuda.get_device_capability()[0] == 9
    times = {"offtower": median_time(ours(x), 15)}
    if hopper:
        times["offtower, portable kernels"] = median_time(ours(x, "portable"), 5)
    notes: dict[str, str] = {}
    if peers:
        usable: dict[str, Callable[[], Any]] = {}
        for name, make in peers_of(x).items():
            if time.monotonic() > deadline:
                notes[name] = "no time left"
                continue
            try:
                call = make()
                call()
                torch.cuda.synchronize()
                usable[name] = call
            except Exception as error:  # not installed, no memory, not for this device
                notes[name] = f"{type(error).__name__}: {error}"[:160].replace("\n", " ")
            torch.cuda.empty_cache()
        # Interleaved with ours, one peer at a time: some fill the memory.
        for name, call in usable.items():
            try:
                case = name.split(":")[0]
                pair = median_time({"ours": ours(x)[case], name: call}, 4)
                times[name] = {case: pair[name], "offtower in turn": pair["ours"]}
            except torch.OutOfMemoryError as error:
                notes[name] = f"OutOfMemoryError: {error}"[:160]
            torch.cuda.empty_cache()
    peak = {name: peak_memory(call) for name, call in ours(x).items()}
    return {"dim": dim, "rows": rows, "ms": times, "notes": notes, "peak_mib": peak}


def show(result: dict[str, Any]) -> None:
    print(
        f"\n{result['device']}; ceilings {result['ceilings']}; built in {result['build_s']:.0f} s"
    )
    for entry in result["shapes"]:
        for name, times in entry["ms"].items():
            if not name.startswith("offtower"):
                print(f"  d={entry['dim']} B={entry['rows']} {name}: {times}")
        for name, why in entry["notes"].items():
            print(f"  d={entry['dim']} B={entry['rows']} {name}: skipped, {why}")
    for failure in result["failed"]:
        print("FAILED", failure)
    print(f"checks: {len(result['failed'])} failed\n")
    heads = [f"d={e['dim']} B={e['rows']}" for e in result["shapes"]]
    print(f"{'ms, N = 1e6, bfloat16':<32}" + "".join(f"{h:>24}" for h in heads))
    for name, goals in GOALS.items():
        cells = []
        for entry in result["shapes"]:
            goal = goals[SHAPES.index((entry["dim"], entry["rows"]))]
            time_ms = entry["ms"]["offtower"][name]
            cells.append(f"{time_ms:.2f} / goal {goal} = {time_ms / goal:.2f}")
        print(f"{name:<32}" + "".join(f"{c:>24}" for c in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=["d64", "d128"])
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--seconds", type=float, default=430, help="after which peers are left out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no NVIDIA GPU: nothing to measure")
    deadline = time.monotonic() + options.seconds
    built = math.nan if options.no_build else build()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "build_s": built,
        "failed": check(),
        "ceilings": ceilings(),
        "shapes": [],
    }
    for dim, rows in SHAPES:
        if options.only in (None, f"d{dim}"):
            result["shapes"].append(measure(dim, rows, not options.no_peers, deadline))
            if options.json:
                options.json.write_text(json.dumps(result, indent=1))
    show(result)
    if result["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
