"""Run the cells (world, method, seed) that have no result yet, and write table and picture.

The output folder holds one JSON file per cell, summary.json, table.txt and values.svg. An
interrupted run goes on with the same command.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from offtower.atomic import write_text
from offtower.benchmarks import Settings
from offtower.benchmarks.million import costs
from offtower.benchmarks.million.methods import METHODS, ORACLE
from offtower.benchmarks.million.world import ID_SHARES, MillionWorld, make_world
from offtower.benchmarks.peers import Unavailable
from offtower.benchmarks.quality.summary import summarize, table
from offtower.errors import ConfigError

ITEMS, ROWS, MINUTES = 1_000_000, 1_000_000, 5.0
QUICK_ITEMS, QUICK_ROWS, QUICK_MINUTES = 2_000, 20_000, 0.05

Line = dict[str, Any]


def run(settings: Settings) -> dict[str, Any]:
    """Simulate, learn and score; see the module docstring for the files."""
    quick = settings.quick
    items = settings.items[0] if settings.items else QUICK_ITEMS if quick else ITEMS
    rows = settings.rows or (QUICK_ROWS if quick else ROWS)
    minutes = settings.minutes or (QUICK_MINUTES if quick else MINUTES)
    worlds = _chosen("world", settings.worlds, tuple(ID_SHARES))
    methods = _chosen("method", settings.methods, tuple(METHODS))
    folder = settings.out or Path("results") / "million"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"items": items, "rows": rows, "minutes": minutes}
    lines = []
    for name in worlds:
        for seed in range(settings.seeds):
            world: MillionWorld | None = None
            for method in methods:
                path = folder / f"{name}-{method}-{seed}.json"
                line = _stored(path, sizes)
                if line is None:
                    if world is None:
                        began = time.perf_counter()
                        world = make_world(name, items, rows, seed)
                        taken = time.perf_counter() - began
                        settings.say(f"{name} seed {seed}: simulated in {taken:.0f} s")
                    line = {**sizes, **_measure(world, method, minutes * 60, seed)}
                    write_text(path, json.dumps(line, indent=1))
                    settings.say(_progress(line))
                lines.append(line)
    summary = {**sizes, "threads": torch.get_num_threads(), **summarize(lines)}
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    text = [*table(summary), *costs.table(lines)]
    write_text(folder / "table.txt", "\n".join(text) + "\n")
    if summary["worlds"]:
        from offtower.benchmarks.quality.plot import values

        write_text(folder / "values.svg", values(summary))
    for one in text:
        settings.say(one)
    return {"suite": "million", "folder": str(folder), **summary}


def _chosen(what: str, given: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown {what} '{name}'; known: {', '.join(known)}")
    return given or known


def _stored(path: Path, sizes: dict[str, Any]) -> Line | None:
    if not path.exists():
        return None
    line: Line = json.loads(path.read_text(encoding="utf-8"))
    other = {key: line.get(key) for key in sizes}
    if other != sizes:
        raise ConfigError(
            f"'{path}' is of a run with {_text(other)}, not {_text(sizes)}; give another --out"
        )
    return line


def _text(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sizes.items())


def _measure(world: MillionWorld, method: str, seconds: float, seed: int) -> Line:
    line: Line = {"world": world.name, "seed": seed, "start": 0, "method": method}
    line["baselines"] = world.baselines
    known = costs.reset_peak()
    try:
        learned = METHODS[method](world, seconds, seed)
    except Unavailable as reason:
        return {**line, "skipped": str(reason)}
    peak = costs.measured_peak(known)
    value = world.value(learned.context, learned.item, learned.bias)
    shown = value.softmax if learned.is_policy else value.greedy

    def shorter(share: float) -> tuple[float, float]:
        one = METHODS[method](world, share * seconds, seed)
        found = world.value(one.context, one.item, one.bias)
        return found.softmax if one.is_policy else found.greedy, one.seconds

    useful = learned.seconds
    if method != ORACLE:
        useful = costs.useful_seconds(shown, learned.seconds, shorter)
    return {
        **line,
        "value": shown,
        "greedy": value.greedy,
        "seconds": round(learned.seconds, 2),
        "useful_seconds": round(useful, 2),
        **peak,
        "facts": learned.facts,
    }


def _progress(line: Line) -> str:
    name = f"{line['world']:<10} seed {line['seed']:<3} {line['method']:<20}"
    if "skipped" in line:
        return f"{name} not run: {line['skipped']}"
    return f"{name} {line['value']:.4f}  greedy {line['greedy']:.4f}  {line['seconds']:.0f} s"
