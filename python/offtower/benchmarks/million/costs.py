"""What a learner of the million-item benchmark costs: seconds, rows per second and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offtower.benchmarks.memory import peak_gib

USEFUL = 0.9
"""Share of the value after all of its time from which a policy counts as useful."""
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the time after which values are measured, each in a run of its own."""
_COLUMNS = ("seconds", "useful_seconds", "rows_per_second", "peak_gib")


def reset_peak() -> bool:
    """Start a new measurement of `peak_gib`; False where the system does not permit it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def useful_seconds(
    value: float, seconds: float, shorter: Callable[[float], tuple[float, float]]
) -> float:
    """Return the seconds of the shortest measured training with USEFUL of a value.

    Args:
        value: after training for all of the time.
        seconds: that this training took.
        shorter: (share of the time) -> (value, seconds) of a training of that share.
    """
    for share in SHARES:
        found, taken = shorter(share)
        if found >= USEFUL * value:
            return min(taken, seconds)
    return seconds


def table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a text table of medians over seeds."""
    head = f"{'seconds':>10}{'to 90 %':>10}{'rows/s':>12}{'peak GiB':>10}"
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        if "value" in line:
            cells.setdefault((line["world"], line["method"]), []).append(line)
    world = ""
    for (of_world, method), found in cells.items():
        if of_world != world:
            world = of_world
            yield f"\n{world}: medians over seeds"
            yield f"  {'method':<24}{head}"
        marks = [_median(found, name) for name in _COLUMNS]
        texts = zip(marks, (10, 10, 12, 10), (1, 1, 0, 2), strict=True)
        yield f"  {method:<24}" + "".join(
            f"{'-':>{width}}" if mark is None else f"{mark:>{width},.{digits}f}"
            for mark, width, digits in texts
        )


def measured_peak(known: bool) -> dict[str, float]:
    """Return the peak memory of the process as a figure of a cell, if it is known."""
    return {"peak_gib": round(peak_gib(), 3)} if known else {}


def _median(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = [{**line.get("facts", {}), **line}.get(name) for line in lines]
    known = [one for one in found if one is not None]
    return float(np.median(known)) if known else None
