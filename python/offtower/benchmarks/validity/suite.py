"""Coverage, width, false go, power and abstention by cell; resumable.

The output folder holds one JSON file per cell, summary.json and table.md. A cell that has its file
with at least as many logs is not run again.
"""

from __future__ import annotations

import fnmatch
import json
import time
from pathlib import Path
from typing import Any

from offtower.atomic import write_text
from offtower.benchmarks import Settings
from offtower.benchmarks.validity.measure import measure
from offtower.benchmarks.validity.table import in_words, summarize, table
from offtower.benchmarks.validity.worlds import Cell, cells
from offtower.errors import ConfigError

LOGS, QUICK_LOGS = 1000, 10
SEED = 1000
"""The constants of gamma intervals were set on the logs of other seeds."""
QUICK = ("benign-n400-*", "heavy-n800-u40-*", "extreme-n200-*", "heavy-n2000-very_rare-*")


def run(settings: Settings) -> dict[str, Any]:
    """Run the cells that have no result of this many logs yet, and write the table."""
    chosen = select(settings.cells or (QUICK if settings.quick else ()))
    logs = settings.logs or (QUICK_LOGS if settings.quick else LOGS)
    folder = settings.out or Path("results") / "validity"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for number, cell in enumerate(chosen):
        path = folder / f"{cell.name}.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["logs"] >= logs:
            continue
        if settings.minutes is not None and time.monotonic() - began > 60 * settings.minutes:
            settings.say("stopped at the time limit; run the same command to resume")
            break
        started = time.process_time()
        lines = measure(cell, logs, seed=SEED + number)
        found = {
            "cell": cell.name,
            "logs": logs,
            "seconds": time.process_time() - started,
            "lines": lines,
        }
        write_text(path, json.dumps(found, indent=1))
        settings.say(f"{cell.name}: {logs} logs in {found['seconds']:.0f} s")
    known = [folder / f"{cell.name}.json" for cell in chosen]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in known if path.exists()]
    summary = summarize(results)
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    write_text(folder / "table.md", table(results, summary))
    for name, pooled in summary["pooled"].items():
        settings.say(f"{name}: {in_words(pooled)}")
    settings.say(f"a row per cell in {folder / 'table.md'}")
    return {"suite": "validity", "folder": str(folder), "cells": results, **summary}


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
