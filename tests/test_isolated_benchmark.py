"""The GPU benchmark's units: one that hangs, crashes or spoils its process costs only itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_policy_terms as bench  # noqa: E402
from isolated import Unit, run_units  # noqa: E402

CHILD = """
import os, sys, time
sys.path.insert(0, {folder!r})
from isolated import serve

def run(name, keep):
    kind = name.split()[0]
    if kind == "hang":
        keep({{"half": 1}})
        time.sleep(600)
    if kind == "crash":
        print("a last word")
        sys.stdout.flush()
        os.abort()
    if kind == "leave":
        os._exit(0)
    if kind == "raise":
        raise ValueError("no")
    if kind == "spoil":
        raise RuntimeError("the device is lost")
    if kind == "child":
        if os.fork() == 0:
            time.sleep(600)
    return {{"process": os.getpid()}}

serve(sys.argv[1:], run, lambda error: "lost" in str(error))
"""


def run(names: list[str], tmp_path: Path, **options: Any) -> tuple[dict[str, Any], list[int]]:
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(folder=str(BENCHMARKS)))
    saved: list[int] = []
    units = [Unit(name, 0.5 if name.startswith("hang") else 20) for name in names]
    found = run_units(
        [sys.executable, str(script)], units, options.pop("seconds", 60.0),
        lambda outcomes: saved.append(len(json.dumps(outcomes))), say=lambda _: None, **options,
    )  # fmt: skip
    return found, saved


def test_failures_end_only_their_unit(tmp_path: Path) -> None:
    names = ["a", "hang", "b", "crash", "leave", "c", "raise", "d", "spoil", "e", "child", "f"]
    found, saved = run(names, tmp_path)
    assert {name: what["status"] for name, what in found.items()} == {
        **dict.fromkeys(["a", "b", "c", "d", "e", "child", "f"], "ok"),
        "hang": "hang", "crash": "crash", "leave": "crash", "raise": "error", "spoil": "error",
    }  # fmt: skip
    assert found["hang"]["half"] == 1 and "killed" in found["hang"]["error"]
    assert "a last word" in found["crash"]["error"]
    assert found["raise"]["error"] == "ValueError: no"
    assert found["spoil"]["spoiled"] and not found["raise"]["spoiled"]
    # The same process goes on after an exception, and another after what spoils it.
    assert found["c"]["process"] == found["d"]["process"] != found["e"]["process"]
    assert len(saved) >= len(names)


def test_no_time_left(tmp_path: Path) -> None:
    found, _ = run(["a", "hang", "b"], tmp_path, seconds=0.0)
    assert {what["status"] for what in found.values()} == {"skipped"}


def test_a_child_that_starts_no_unit_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    found = run_units(
        command, [Unit("a", 9), Unit("b", 9)], 60, lambda _: None, start_limit=0.3,
        say=lambda _: None,
    )  # fmt: skip
    assert {what["status"] for what in found.values()} == {"hang"}
    found = run_units(
        [sys.executable, "-c", "raise SystemExit('no torch')"], [Unit("a", 9)], 60, lambda _: None,
        say=lambda _: None,
    )  # fmt: skip
    assert found["a"]["status"] == "crash" and "no torch" in found["a"]["error"]


def test_units_of_kernels_that_hang_are_skipped() -> None:
    """One kind's kernels hang: the others are timed, and the portable ones of that kind."""
    units = [u.name for u in bench.units(peers=True, rehearsal=False, only="")]
    outcomes = {"check own bfloat16 sigmoid": {"status": "hang"}}
    runs = {name for name in units if bench.why_not(name, outcomes) == ""}
    assert "time d=64 B=1024 log_prob forward" in runs
    assert "time d=64 B=1024 DR sigmoid forward+backward" not in runs
    assert "portable d=64 B=1024 DR sigmoid forward+backward" in runs
    assert "portable d=64 B=1024 log_prob forward" not in runs
    assert "test test_graph_capture bfloat16" not in runs
    assert "test test_a_million_items float32" in runs
    everything = {name for name in units if bench.why_not(name, {}) == ""}
    assert everything == {name for name in units if not name.startswith("portable")}


def test_reasons_not_to_run(tmp_path: Path) -> None:
    """A fallback runs once what it stands in for has failed, else it leaves no trace."""

    def why_not(name: str, outcomes: dict[str, dict[str, Any]]) -> str | None:
        if name.startswith("fallback"):
            return "" if outcomes.get(name[9:], {}).get("status") == "crash" else None
        return "not today" if name == "never" else ""

    found, _ = run(
        ["fallback crash", "fallback a", "a", "crash", "never"], tmp_path, why_not=why_not
    )
    assert {name: what["status"] for name, what in found.items()} == {
        "a": "ok", "crash": "crash", "fallback crash": "ok", "never": "skipped",
    }  # fmt: skip


def test_the_table_shows_partial_results(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "d=64 B=1024"
    units = {
        f"time {shape} log_prob forward": {"status": "ok", "ms": {"own": 0.5, "portable": 0.9}},
        f"time {shape} DR identity forward+backward": {
            "status": "hang", "error": "killed", "ms": {"own": 2.0},
        },
        f"time {shape} DR sigmoid forward+backward": {"status": "crash", "error": "died"},
        f"peer {shape} log_prob forward: chunked torch": {
            "status": "ok", "ms": {"own": 1, "peer": 2},
        },
        "check own bfloat16 none": {"status": "error", "error": "AssertionError: du"},
    }  # fmt: skip
    bench.show({"device": "none", "build_s": 0.0, "seconds": 1.0, "units": units})
    said = capsys.readouterr().out
    assert "0.50 / 0.43 = 1.16" in said and "2.00 / 1.7 = 1.18" in said
    assert "crash" in said and "check own bfloat16 none: ERROR: AssertionError: du" in said
    assert "chunked torch: 2.00 ms, offtower in turn 1.00" in said
    assert "checks: 0 of 1 passed" in said


def test_units_are_all_known() -> None:
    """Each timed case has a goal, each peer a case and each test a function."""
    import gpu_policy_terms_units as units
    from tests.ops import test_cuda

    assert tuple(bench.GOALS) == units.CASES
    names = [u.name for u in bench.units(peers=True, rehearsal=False, only="")]
    assert len(set(names)) == len(names)
    for name in names:
        if name.startswith("peer"):
            assert name.split(" ", 3)[3].partition(":")[0] in units.CASES
        if name.startswith("test"):
            assert callable(getattr(test_cuda, name.split()[1]))


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """The whole script, on a CPU."""
    script, found = BENCHMARKS / "gpu_policy_terms.py", tmp_path / "r.json"
    done = subprocess.run(
        [sys.executable, script, "--rehearse", "--json", found],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    units = json.loads(found.read_text())["units"]
    kept = {n: w["status"] for n, w in units.items() if not n.startswith("peer")}
    assert set(kept.values()) == {"ok"}
