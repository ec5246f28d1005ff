"""Rows per second of training with exact and sampled terms, and of other packages' trainers."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from offtower.benchmarks import Settings, world
from offtower.benchmarks.peers import PEERS, Unavailable
from offtower.prepare import PreparedData, prepare
from offtower.progress import Progress
from offtower.training.run import build_trainer

EPOCHS = 4
"""Epochs per run; the first warms up, the median of the others is reported."""

EXACT_CELLS = 4e10
"""Most rows x items of a run with exact terms."""


def run(settings: Settings) -> dict[str, Any]:
    """Measure every mode and peer at every catalogue size."""
    results: list[dict[str, Any]] = []
    settings.say(
        f"rows per second, batches of {settings.batch}, d = {settings.dim}, "
        f"{torch.get_num_threads()} threads"
    )
    for items in settings.items:
        rows = settings.batch * settings.steps
        log, catalogue = world.in_memory(rows, items)
        data = prepare(log, None, catalogue, Progress())
        for mode in world.MODES:
            line = {"items": items, "trainer": f"offtower {mode}"}
            if mode == "exact" and EPOCHS * rows * items > EXACT_CELLS:
                few = max(2, int(EXACT_CELLS / (EPOCHS * settings.batch * items)))
                if few * EPOCHS * settings.batch * items > 2 * EXACT_CELLS:
                    line["skipped"] = f"{settings.batch} x {items:,} terms per step take too long"
                else:
                    shorter, _ = world.in_memory(settings.batch * few, items)
                    part = prepare(shorter, None, catalogue, Progress())
                    line["rows_per_second"] = rate(part, mode, settings)
            else:
                line["rows_per_second"] = rate(data, mode, settings)
            report(settings, line)
            results.append(line)
        if not settings.peers:
            continue
        for name, peer in PEERS.items():
            line = {"items": items, "trainer": name}
            try:
                line["rows_per_second"] = peer(items, settings.dim, settings.batch, settings.steps)
            except Unavailable as reason:
                line["skipped"] = str(reason)
            except Exception as error:  # Report a failure in another package and go on.
                line["skipped"] = f"failed with {type(error).__name__}: {error}"
            report(settings, line)
            results.append(line)
    return {
        "suite": "train",
        "batch": settings.batch,
        "dim": settings.dim,
        "threads": torch.get_num_threads(),
        "results": results,
    }


def rate(data: PreparedData, mode: str, settings: Settings) -> float:
    """Return the median rows per second of the epochs after the first."""
    config = world.config(mode, batch=settings.batch, dim=settings.dim, epochs=EPOCHS)
    result = build_trainer(config, data, None).fit()
    return statistics.median(float(line["rows_per_second"]) for line in result.history[1:])


def report(settings: Settings, line: dict[str, Any]) -> None:
    if "skipped" in line:
        report_skipped(settings, line["items"], line["trainer"], line["skipped"])
        return
    settings.say(f"{line['items']:>12,}  {line['trainer']:<26}{line['rows_per_second']:12,.0f}")


def report_skipped(settings: Settings, items: int, name: str, why: str) -> None:
    settings.say(f"{items:>12,}  {name:<26}   not run: {why}")
