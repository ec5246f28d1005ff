"""Build, check and time the operators on an NVIDIA GPU, beside other implementations of the terms.

    python3 benchmarks/gpu_policy_terms.py --out gpu              # everything, in under 6 minutes
    python3 benchmarks/gpu_policy_terms.py --only "d=64 "         # units whose names contain this
    python3 benchmarks/gpu_policy_terms.py --no-peers
    python3 benchmarks/gpu_policy_terms.py --build-only --python P --architectures 90a
    python3 benchmarks/gpu_policy_terms.py --rehearse             # run the script on a CPU

Builds the CUDA core in place with nvcc for the Python and torch that run it, offline. A core or
objects from the same sources are reused, so a build made elsewhere for interpreter P
(--build-only) saves those minutes. Then compares every kernel with float64, and times it with
bfloat16 and N = 1e6 random items: variants alternate, and medians of CUDA event times are reported.

Each check and each timing is a unit that runs in a child process with a time limit: one that hangs
or crashes is killed and reported, and the others go on. OUT/gpu.json is written after each unit. A
short table comes last, also in OUT/table.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / p) for p in ("python", "", "csrc/cuda", "benchmarks")]

from isolated import Unit, run_units, serve  # noqa: E402

SHAPES = ((64, 1024), (128, 1024), (64, 4096), (128, 4096))
# Milliseconds on one H200: what FlashAttention-3's measured efficiency would give, plus 10 to 20 %.
GOALS = {
    "log_prob forward": (0.43, 0.58, 1.7, 2.3),
    "+ expected_reward forward": (0.58, 0.9, 2.3, 3.6),
    "log_prob forward+backward": (1.3, 2.0, 5.0, 7.8),
    "DR identity forward+backward": (1.7, 2.7, 6.6, 10.5),
    "DR sigmoid forward+backward": (2.2, 3.2, 8.6, 12.5),
}
KIND_OF_CASE = dict(zip(GOALS, ("none", "identity", "none", "identity", "sigmoid"), strict=True))
TESTS = (
    "test_a_million_items bfloat16",
    "test_top_k_equals_a_stable_sort_of_the_logits bfloat16",
    "test_graph_capture bfloat16",
    "test_several_streams",
    "test_calls_do_not_synchronize",
    "test_invalid_actions_affect_only_their_rows",
    "test_tf32_on_request",
    "test_more_rows_than_a_grid_dimension",
    "test_offsets_beyond_32_bits",
    "test_merged_slices_equal_the_whole bfloat16",
    "test_same_bits_a_thousand_times bfloat16 300x30000x64",
    "test_same_bits_a_thousand_times bfloat16 64x3000x128",
    "test_a_million_items float32",
)
KINDS = ("none", "identity", "sigmoid", "dense")
SECONDS = 360.0


def units(peers: bool, rehearsal: bool, only: str) -> list[Unit]:
    """Return the units, most important first, in case the time runs out."""
    shapes = [f"d={d} B={b}" for d, b in SHAPES]
    first = [Unit(f"check own bfloat16 {kind}", 40) for kind in KINDS]
    timed = [
        Unit(f"{word} {shape} {case}", 25)
        for word in ("time", "portable")
        for shape in shapes
        for case in GOALS
    ]
    biased = [
        Unit(f"bias d={d} B=1024 {case}", 25)
        for d in (64, 128)
        for case in ("log_prob forward", "log_prob forward+backward")
    ]
    checks = [
        Unit(f"check portable {dtype} {kind}", 40)
        for dtype in ("bfloat16", "float32")
        for kind in KINDS
    ]
    tests = [Unit(f"test {name}", 40) for name in TESTS]
    memory = [Unit(f"memory {shape}", 25) for shape in shapes]
    rivals: list[Unit] = []
    compiled: list[Unit] = []
    if peers:
        from gpu_policy_terms_peers import NAMES

        slow = "torch.compile"
        rivals = [Unit(f"peer {s} {n}", 25) for n in NAMES if not n.endswith(slow) for s in shapes]
        if not rehearsal:
            compiled = [
                Unit(f"peer {s} {n}", 90) for n in NAMES if n.endswith(slow) for s in shapes
            ]
    every = [
        *first, Unit("ceilings", 25), *timed, *biased, *checks, *tests, *rivals, *memory, *compiled,
    ]  # fmt: skip
    return [u for u in every if only in u.name]


def why_not(name: str, outcomes: dict[str, dict[str, Any]]) -> str | None:
    """Skip kernels that hung or crashed in their check; the portable ones run in their place."""

    def is_lost(what: dict[str, Any]) -> bool:
        return what.get("status") in ("hang", "crash") or bool(what.get("spoiled"))

    lost = {kind for kind in KINDS if is_lost(outcomes.get(f"check own bfloat16 {kind}", {}))}
    word, _, rest = name.partition(" ")
    if word == "test" and "float32" not in name and "tf32" not in name:
        return "kernels hang or crash in their check" if lost else ""
    if word == "memory":
        return "kernels hang or crash in their check" if lost else ""
    if word not in ("time", "portable", "peer", "bias"):
        return ""
    case = rest.split(" ", 2)[2].partition(":")[0]
    if word == "portable":
        return "" if KIND_OF_CASE[case] in lost else None
    return "its kernels hang or crash in their check" if KIND_OF_CASE[case] in lost else ""


def device() -> tuple[str, str]:
    """Return the name and architecture of the device, as found by a child process."""
    query = (
        "import torch; print(*torch.cuda.get_device_capability(), "
        "torch.cuda.get_device_name(), 'torch', torch.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", query], capture_output=True, text=True, timeout=120
    )
    if done.returncode != 0:
        raise SystemExit(f"torch finds no NVIDIA GPU to measure on\n{done.stderr[-500:]}")
    major, minor, name = done.stdout.strip().split(" ", 2)
    return name, "90a" if major == "9" else f"{major}{minor}"


def missing_tools(python: str) -> list[str]:
    """Return what a build for the interpreter `python` lacks here."""
    import cuda_build

    query = "import sysconfig; print(sysconfig.get_paths()['include'])"
    include = subprocess.run([python, "-c", query], capture_output=True, text=True).stdout.strip()
    header = Path(include, "Python.h")
    found = {
        "nvcc (of CUDA_HOME, /usr/local/cuda or the PATH)": cuda_build.find_nvcc(),
        "g++": shutil.which("g++"),
        f"{header} (the package python3-dev)": header.exists(),
        "libcudart_static.a beside nvcc": cuda_build.library_folders(),
    }
    return [what for what, where in found.items() if not where]


def core_is_current(architectures: list[str]) -> bool:
    """Return whether a core built from the current sources loads in this Python."""
    import cuda_build

    query = "from offtower.ops import _cuda; print(_cuda.sources, _cuda.architectures, sep='|')"
    path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", query],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    sources, _, built = done.stdout.strip().partition("|")
    wanted = {f"sm_{a}" for a in architectures}
    return (
        done.returncode == 0
        and sources == cuda_build.fingerprint()
        and wanted <= set(built.split(", "))
    )


def build(architectures: list[str], python: str, folder: Path) -> float:
    """Build the core and return the seconds it took."""
    import cuda_build

    begin = time.perf_counter()
    # torch ships pybind11's headers; find_spec locates it without importing it.
    torch_at = importlib.util.find_spec("torch")
    assert torch_at is not None and torch_at.origin is not None
    cuda_build.build_in_place(
        architectures, str(Path(torch_at.origin).parent / "include"), folder, python
    )
    return time.perf_counter() - begin


def show(result: dict[str, Any]) -> None:
    outcomes: dict[str, dict[str, Any]] = result["units"]
    heads = [f"d={d} B={b}" for d, b in SHAPES]
    for name, what in outcomes.items():
        if name.startswith("peer") and what["status"] == "ok":
            ms = what["ms"]
            print(f"{name[5:]}: {ms['peer']:.2f} ms, offtower in turn {ms['own']:.2f}")
    by_reason: dict[str, list[str]] = {}  # report a missing peer once
    for name, what in outcomes.items():
        if what["status"] != "ok":
            why = f"{what['status'].upper()}: {what.get('error', '')[:200]}".replace("\n", " ")
            by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"{names[0]}{more}: {why}")
    for word in ("check", "test"):
        kept = [w["status"] for name, w in outcomes.items() if name.startswith(word)]
        print(f"{word}s: {kept.count('ok')} of {len(kept)} passed")
    rates = outcomes.get("ceilings", {})
    print(
        f"\n{result['device']}; product {rates.get('product_tflops', 0):.0f} TFLOP/s, copy "
        f"{rates.get('copy_tbps', 0):.2f} TB/s; built in {result['build_s']:.0f} s, all in "
        f"{result['seconds']:.0f} s"
    )
    for family in ("own", "portable"):
        head = "ms / goal (back to back)" if family == "own" else "portable kernels, ms"
        print(f"{head:<30}" + "".join(f"{h:>27}" for h in heads))
        for case, goals in GOALS.items():
            cells = []
            for shape, goal in zip(heads, goals, strict=True):
                what = outcomes.get(f"time {shape} {case}", {})
                if family == "portable":
                    what = outcomes.get(f"portable {shape} {case}", what)
                ms = what.get("ms", {}).get(family)
                shown = what.get("status", "-") if ms is None else f"{ms:.2f}"
                if ms is not None and family == "own":
                    shown += f" / {goal} = {ms / goal:.2f}"
                    sustained = what.get("back_to_back_ms")
                    shown += f" ({sustained:.2f})" if sustained else ""
                cells.append(shown)
            print(f"{case:<30}" + "".join(f"{c:>27}" for c in cells))


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1))
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for gpu.json and table.txt")
    parser.add_argument("--json", type=Path, help="by default OUT/gpu.json")
    parser.add_argument("--only", default="", help="run units whose names contain this")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="limit for everything, including the build"
    )
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--python", default=sys.executable, help="interpreter to build for")
    parser.add_argument("--architectures", nargs="+", help="as in 80 90a; by default the device's")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build_only and not options.architectures:
        parser.error("--build-only needs --architectures")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        options.json = options.json or options.out / "gpu.json"
    if options.child is not None:
        from gpu_policy_terms_units import Bench, spoils

        return serve(options.child, Bench(options.rehearse).run, spoils)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # keep the output if this process is killed
    begin = time.monotonic()
    built, name, here = 0.0, "a rehearsal on a CPU", ""
    if not (options.rehearse or options.build_only):
        name, here = device()
    if not options.rehearse:
        wanted = options.architectures or [here]
        if options.build_only or not (options.no_build or core_is_current(wanted)):
            if missing := missing_tools(options.python):
                raise SystemExit(f"cannot build the CUDA core: no {', no '.join(missing)}")
            built = build(wanted, options.python, ROOT / "build/gpu")
            print(f"built for {', '.join(wanted)} in {built:.0f} s")
        if options.build_only:
            return None
    result: dict[str, Any] = {"device": name, "build_s": built, "seconds": 0.0, "units": {}}

    def save(outcomes: dict[str, dict[str, Any]]) -> None:
        result.update(units=outcomes, seconds=time.monotonic() - begin)
        write(options.json, result)

    command = [sys.executable, __file__, *(["--rehearse"] if options.rehearse else []), "--child"]
    chosen = units(not options.no_peers, options.rehearse, options.only)
    run_units(command, chosen, options.seconds - (time.monotonic() - begin), save, why_not=why_not)
    table = io.StringIO()
    with contextlib.redirect_stdout(table):
        show(result)
    print(table.getvalue(), end="")
    if options.out is not None:
        (options.out / "table.txt").write_text(table.getvalue())
    failed = [n for n, w in result["units"].items() if n[:4] in ("chec", "test", "time")]
    if any(result["units"][n]["status"] not in ("ok", "skipped") for n in failed):
        raise SystemExit(1)
    return None


if __name__ == "__main__":
    main()
