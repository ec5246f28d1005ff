"""Run units of a benchmark in child processes, so that a crash or a hang ends only one unit.

The child runs the named units in turn and reports each result in a file of JSON lines. If the child
dies or a unit exceeds its limit, the parent kills the child, records the outcome of that unit, and
starts another child for the remaining units.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS = "OFFTOWER_BENCHMARK_EVENTS"
POLL = 0.05  # seconds
LEAVE = 10.0  # seconds to wait for a killed child; one blocked in a driver is abandoned
OUTPUT = 600  # characters of a dead child's output to keep


@dataclass(frozen=True)
class Unit:
    name: str
    limit: float  # seconds


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    folder: Path
    read: int = 0
    current: str | None = None
    since: float = 0.0

    def events(self) -> list[dict[str, Any]]:
        """Return new complete lines."""
        with (self.folder / "events").open("rb") as file:
            file.seek(self.read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def output_tail(self) -> str:
        text = (self.folder / "output").read_text(errors="replace").strip()
        return text[-OUTPUT:]

    def kill(self) -> None:
        """Kill the child's process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LEAVE)


def run_units(
    command: Sequence[str],
    units: Sequence[Unit],
    seconds: float,
    save: Callable[[dict[str, dict[str, Any]]], None],
    *,
    start_limit: float = 60.0,
    say: Callable[[str], None] = print,
    why_not: Callable[[str, dict[str, dict[str, Any]]], str | None] = lambda name, outcomes: "",
) -> dict[str, dict[str, Any]]:
    """Run units and return the outcome of each by name: "status", "seconds" and its result.

    Statuses: "ok"; "error", the unit raised ("spoiled": its process cannot continue); "crash", the
    child died during the unit; "hang", the unit exceeded its limit and was killed; "skipped", no
    time was left or `why_not` gave a reason.

    Args:
        command: Starts a child that calls `serve`; names of units are appended.
        units: Units in the order to run them.
        seconds: Limit for all units; the unit running then is killed.
        save: Called with all outcomes after each unit.
        start_limit: Seconds from a child's start to its first unit.
        why_not: Called before a child starts. Returns "" to run a unit, a reason to skip it, or
            None to decide before the next child; units that stay undecided have no outcome.
    """
    deadline = time.monotonic() + seconds
    outcomes: dict[str, dict[str, Any]] = {}
    while time.monotonic() < deadline:
        chosen = []
        for unit in units:
            reason = None if unit.name in outcomes else why_not(unit.name, outcomes)
            if reason == "":
                chosen.append(unit)
            elif reason is not None:
                outcomes[unit.name] = {"status": "skipped", "error": reason}
        if not chosen:
            break
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            _run_child(command, chosen, deadline, start_limit, outcomes, save, Path(folder), say)
    for unit in units:
        if unit.name not in outcomes and why_not(unit.name, outcomes) == "":
            outcomes[unit.name] = {"status": "skipped", "error": "no time left"}
    save(outcomes)
    return outcomes


def _run_child(
    command: Sequence[str],
    units: Sequence[Unit],
    deadline: float,
    start_limit: float,
    outcomes: dict[str, dict[str, Any]],
    save: Callable[[dict[str, dict[str, Any]]], None],
    folder: Path,
    say: Callable[[str], None],
) -> None:
    (folder / "events").touch()
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*command, *(u.name for u in units)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, EVENTS: str(folder / "events")},
        )
    child = _Child(process, folder, since=time.monotonic())
    limits = {u.name: u.limit for u in units}
    parts: dict[str, dict[str, Any]] = {}

    def end(name: str, status: str, **what: Any) -> None:
        took = time.monotonic() - child.since
        kept = parts.get(name, {})
        outcomes[name] = {**kept, **what, "status": status, "seconds": round(took, 2)}
        child.current, child.since = None, time.monotonic()
        save(outcomes)
        say(
            f"{status:>7} {took:6.1f} s  {name}" + (f": {what['error']}" if "error" in what else "")
        )

    try:
        while True:
            over = process.poll() is not None  # checked before the last events are read
            for event in child.events():
                if "begin" in event:
                    child.current, child.since = event["begin"], time.monotonic()
                elif "part" in event:
                    parts.setdefault(event["part"], {}).update(event["what"])
                else:
                    end(event["end"], event["status"], **event["what"])
            now = time.monotonic()
            if all(u.name in outcomes for u in units):
                return
            if over:
                break
            if child.current is None and now - child.since > start_limit:
                end(_next(units, outcomes), "hang", error=f"no unit began in {start_limit:.0f} s")
                return
            name = child.current
            if name is not None and (now - child.since > limits[name] or now > deadline):
                took = f"killed after {now - child.since:.0f} s"
                end(name, "hang", error=took)
                return
            if name is None and now > deadline:
                return
            time.sleep(POLL)
    finally:
        child.kill()
    # The child ended during a unit, before its first one, or to be replaced by a new process.
    idle = all(u.name not in outcomes for u in units)
    if child.current or process.returncode or idle:
        name = child.current or _next(units, outcomes)
        error = f"the process ended with {process.returncode}: {child.output_tail() or 'no output'}"
        end(name, "crash", error=error)


def _next(units: Sequence[Unit], outcomes: dict[str, dict[str, Any]]) -> str:
    return next(u.name for u in units if u.name not in outcomes)


def serve(
    names: Sequence[str],
    run: Callable[[str, Callable[[dict[str, Any]], None]], dict[str, Any]],
    spoils: Callable[[Exception], bool],
) -> None:
    """Run units in a child process and report them to the parent.

    Args:
        names: Names of the units.
        run: Runs a unit and returns its result. Its second argument is a function that records
            partial results, which are kept if the unit does not finish.
        spoils: Returns whether the process cannot continue after an exception.
    """

    def report(event: dict[str, Any]) -> None:
        with Path(os.environ[EVENTS]).open("a") as file:
            file.write(json.dumps(event) + "\n")

    for name in names:
        report({"begin": name})
        try:
            what = run(name, lambda part, name=name: report({"part": name, "what": part}))  # type: ignore[misc]
            report({"end": name, "status": "ok", "what": what})
        except Exception as error:
            what = {"error": f"{type(error).__name__}: {error}"[:OUTPUT], "spoiled": spoils(error)}
            report({"end": name, "status": "error", "what": what})
            if what["spoiled"]:
                os._exit(0)
