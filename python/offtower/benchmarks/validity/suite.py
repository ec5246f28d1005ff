"""Coverage, width, false go, power and abstention by cell; resumable.

The output folder holds one JSON file per cell, summary.json and table.md. Cells take turns, a round
of logs each, so that every cell has about as many when the benchmark is stopped. Each round has a
seed of its own: a run with more logs adds to those that are there.
"""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offtower.atomic import write_text
from offtower.benchmarks import Settings
from offtower.benchmarks.validity.measure import measure, pool
from offtower.benchmarks.validity.table import in_words, summarize, table
from offtower.benchmarks.validity.worlds import Cell, cells
from offtower.errors import ConfigError

LOGS, QUICK_LOGS = 1000, 10
ROUND_LOGS = 50
SEED = 1000
"""Of the first round of the first cell. The constants of gamma intervals were set on logs of other
seeds."""
QUICK = ("benign-n400-*", "heavy-n800-u40-*", "extreme-n200-*", "heavy-n2000-very_rare-*")


def run(settings: Settings) -> dict[str, Any]:
    """Run the cells that have no result of this many logs yet, and write the table."""
    chosen = select(settings.cells or (QUICK if settings.quick else ()))
    logs = settings.logs or (QUICK_LOGS if settings.quick else LOGS)
    folder = settings.out or Path("results") / "validity"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for cell in _short_of(chosen, logs, folder):
        if settings.minutes is not None and time.monotonic() - began > 60 * settings.minutes:
            settings.say("stopped at the time limit; run the same command to resume")
            break
        found = _add_round(cell, logs, folder)
        seconds, done = found["rounds"][-1]["seconds"], found["logs"]
        settings.say(f"{cell.name}: {done} logs, the last in {seconds:.0f} s")
    known = [folder / f"{cell.name}.json" for cell in chosen]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in known if path.exists()]
    summary = summarize(results)
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    write_text(folder / "table.md", table(results, summary))
    for name, pooled in summary["pooled"].items():
        settings.say(f"{name}: {in_words(pooled)}")
    settings.say(f"a row per cell in {folder / 'table.md'}")
    return {"suite": "validity", "folder": str(folder), "cells": results, **summary}


def _short_of(chosen: list[Cell], logs: int, folder: Path) -> Iterator[Cell]:
    """Cells that have fewer logs, each as often as it needs rounds, in turn."""
    while True:
        short = [cell for cell in chosen if _read(cell, folder)["logs"] < logs]
        if not short:
            return
        least = min(_read(cell, folder)["logs"] for cell in short)
        yield from (cell for cell in short if _read(cell, folder)["logs"] == least)


def _add_round(cell: Cell, logs: int, folder: Path) -> dict[str, Any]:
    """Measure a round of further logs of a cell, and write its file."""
    found = _read(cell, folder)
    rounds, count = found["rounds"], min(ROUND_LOGS, logs - found["logs"])
    seed = SEED * (1 + len(rounds)) + cells().index(cell)
    started = time.process_time()
    lines = measure(cell, count, seed)
    rounds.append({"logs": count, "seconds": time.process_time() - started, "lines": lines})
    found = {
        "cell": cell.name,
        "logs": sum(one["logs"] for one in rounds),
        "lines": pool([one["lines"] for one in rounds]),
        "rounds": rounds,
    }
    write_text(folder / f"{cell.name}.json", json.dumps(found, indent=1))
    return found


def _read(cell: Cell, folder: Path) -> dict[str, Any]:
    path = folder / f"{cell.name}.json"
    if not path.exists():
        return {"logs": 0, "rounds": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def select(patterns: tuple[str, ...]) -> list[Cell]:
    """Cells whose name matches a pattern; all without one. Raises ConfigError where none does."""
    every = cells()
    if not patterns:
        return list(every)
    found = [c for c in every if any(fnmatch.fnmatch(c.name, p) for p in patterns)]
    if not found:
        known = ", ".join(cell.name for cell in every)
        raise ConfigError(f"no cell is named {', '.join(patterns)}; known: {known}")
    return found
