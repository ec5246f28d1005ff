"""Run the cells of a table that have no result yet, and write the table.

The output folder contains settings.yaml, command.txt, results.jsonl (one line per cell, appended
when the cell ends), results.csv, summary.json and values.svg. An interrupted run resumes there.
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
from offtower.benchmarks.quality.methods import METHODS, NotApplicable
from offtower.benchmarks.quality.settings import QualitySettings, load_settings, to_dict
from offtower.benchmarks.quality.summary import summarize, table
from offtower.benchmarks.quality.world import QualityWorld
from offtower.errors import ConfigError, RunError

DEFAULT = Path("configs/quality/small.yaml")

Line = dict[str, Any]


def run(settings: Settings) -> dict[str, Any]:
    """Run all methods on all worlds and summarize; see the module docstring for the files."""
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
            settings.say("stopped at the time limit; run the same command to resume")
            break
        if kept is None or kept[0] != (number, seed):
            kept = (number, seed), world_settings.make(seed, settings.data)
        line = _measure(kept[1], method, seed, start)
        line["world_settings"] = worlds[number]
        with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        results.append(line)
        settings.say(_progress_line(line))
    cells = [(keys[world], *rest) for world, *rest in quality.cells()]
    position = {cell: number for number, cell in enumerate(cells)}
    results.sort(key=lambda line: position.get(_key(line), len(position)))
    summary = summarize(results)
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
    complete: list[Line] = []
    for number, one in enumerate(lines):
        try:
            complete.append(json.loads(one))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise RunError(f"'{path}' is damaged in line {number + 1}") from None
            # The process was killed while it wrote the last line.
            write_text(path, "".join(json.dumps(line) + "\n" for line in complete))
    return complete


def _measure(world: QualityWorld, method: str, seed: int, start: int) -> Line:
    line: Line = {"world": world.name, "seed": seed, "start": start, "method": method}
    line["baselines"] = world.baselines
    try:
        # Distinct training seeds for all worlds and starts.
        learned = METHODS[method](world, 1000 * start + seed)
    except NotApplicable as reason:
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


def _progress_line(line: Line) -> str:
    found = f"{line['value']:.4f}  greedy {line['greedy']:.4f}" if "value" in line else "not run"
    why = line.get("skipped", f"{line.get('seconds', 0):.0f} s")
    return f"{line['world']:<44} seed {line['seed']:<3} {line['method']:<24} {found}  {why}"


def _csv(results: list[Line]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = ("world", "seed", "start", "method", "value", "greedy", "seconds")
    baselines = ("logging", "best_fixed", "supervised", "optimum")
    writer.writerow([*columns, *baselines])
    for line in results:
        if "value" in line:
            of_world = [line["baselines"].get(name, "") for name in baselines]
            writer.writerow([*(line[name] for name in columns), *of_world])
    return buffer.getvalue()
