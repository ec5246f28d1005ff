"""Runs the cells of a table that are not there yet, and writes the table.

In the folder: settings.yaml, command.txt, results.jsonl (a line a cell, appended as it ends),
results.csv, summary.json and values.svg. A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from offtower.atomic import write_text
from offtower.benchmarks import Settings
from offtower.benchmarks.quality.methods import METHODS, NotForThisWorld
from offtower.benchmarks.quality.settings import QualitySettings, load_settings, to_dict
from offtower.benchmarks.quality.summary import summarise, table
from offtower.benchmarks.quality.world import QualityWorld
from offtower.errors import ConfigError, RunError

DEFAULT = Path("configs/quality/small.yaml")

Line = dict[str, Any]


def run(settings: Settings) -> dict[str, Any]:
    """Learn, value, and summarise; see the module's text for the files."""
    path = settings.config or DEFAULT
    quality = load_settings(path)
    unknown = [name for name in quality.methods if name not in METHODS]
    if unknown:
        raise ConfigError(f"{path}: unknown method '{unknown[0]}'; known: {', '.join(METHODS)}")
    folder = settings.out or Path("results") / "quality" / quality.name
    results = _open(folder, quality, settings)
    worlds = to_dict(quality)["worlds"]
    keys = [_world_key(world) for world in worlds]
    done = {_key(line) for line in results}
    began = time.monotonic()
    kept: tuple[tuple[int, int], QualityWorld] | None = None
    for number, seed, start, method in quality.cells():
        world_settings = quality.worlds[number]
        if world_settings.kind == "label_set" and settings.data is None:
            continue
        if (keys[number], seed, start, method) in done:
            continue
        if settings.minutes is not None and time.monotonic() - began > 60 * settings.minutes:
            settings.say("time is up; the same command goes on from here")
            break
        if kept is None or kept[0] != (number, seed):
            kept = (number, seed), world_settings.make(seed, settings.data)
        line = _measure(kept[1], method, seed, start)
        line["world_settings"] = worlds[number]
        with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        results.append(line)
        settings.say(_told(line))
    # In the order of the settings, whatever was measured first.
    cells = [(keys[world], *rest) for world, *rest in quality.cells()]
    place = {cell: number for number, cell in enumerate(cells)}
    results.sort(key=lambda line: place.get(_key(line), len(place)))
    summary = summarise(results)
    write_text(folder / "results.csv", _csv(results))
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    if summary["worlds"]:
        from offtower.benchmarks.quality.plot import values

        write_text(folder / "values.svg", values(summary))
    for text in table(summary):
        settings.say(text)
    return {"suite": "quality", "folder": str(folder), **summary}


def _open(folder: Path, quality: QualitySettings, settings: Settings) -> list[Line]:
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_dict(quality), sort_keys=False)
    write_text(folder / "settings.yaml", text)
    write_text(folder / "command.txt", shlex.join(["offtower", *sys.argv[1:]]) + "\n")
    path = folder / "results.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    whole: list[Line] = []
    for number, one in enumerate(lines):
        try:
            whole.append(json.loads(one))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise RunError(f"'{path}' is damaged in line {number + 1}") from None
            # The last line of a run that was killed while it wrote.
            write_text(path, "".join(json.dumps(line) + "\n" for line in whole))
    return whole


def _measure(world: QualityWorld, method: str, seed: int, start: int) -> Line:
    line: Line = {"world": world.name, "seed": seed, "start": start, "method": method}
    line["landmarks"] = world.landmarks
    try:
        # Learners' seeds of one world differ from each other and from those of other worlds.
        learned = METHODS[method](world, 1000 * start + seed)
    except NotForThisWorld as reason:
        return {**line, "skipped": str(reason)}
    return {
        **line,
        "value": learned.value.softmax,
        "greedy": learned.value.greedy,
        "seconds": round(learned.seconds, 2),
        **({"facts": learned.facts} if learned.facts else {}),
    }


def _key(line: Line) -> tuple[str, int, int, str]:
    return _world_key(line["world_settings"]), line["seed"], line["start"], line["method"]


def _world_key(world: dict[str, Any]) -> str:
    return json.dumps(world, sort_keys=True)


def _told(line: Line) -> str:
    found = f"{line['value']:.4f}  greedy {line['greedy']:.4f}" if "value" in line else "not run"
    why = line.get("skipped", f"{line.get('seconds', 0):.0f} s")
    return f"{line['world']:<44} seed {line['seed']:<3} {line['method']:<24} {found}  {why}"


def _csv(results: list[Line]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    landmarks = ("logging", "best_fixed", "supervised", "optimum")
    writer.writerow(["world", "seed", "start", "method", "value", "greedy", "seconds", *landmarks])
    for line in results:
        if "value" in line:
            marks = [line["landmarks"].get(name, "") for name in landmarks]
            writer.writerow(
                [
                    line["world"],
                    line["seed"],
                    line["start"],
                    line["method"],
                    line["value"],
                    line["greedy"],
                    line["seconds"],
                    *marks,
                ]
            )
    return buffer.getvalue()
