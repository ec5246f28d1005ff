"""Benchmark suites of `offtower benchmark SUITE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offtower.errors import ConfigError
from offtower.imports import load_by_path

SUITES: Mapping[str, str] = {
    "ops": "offtower.benchmarks.operators:run",
    "eligible": "offtower.benchmarks.eligible:run",
    "train": "offtower.benchmarks.train:run",
    "memory": "offtower.benchmarks.memory:run",
    "quality": "offtower.benchmarks.quality.suite:run",
    "validity": "offtower.benchmarks.validity.suite:run",
    "million": "offtower.benchmarks.million.suite:run",
}
"""Import path of each suite's function."""


@dataclass(frozen=True)
class Settings:
    """Settings shared by all suites."""

    items: tuple[int, ...]
    """Empty in a suite with sizes of its own."""
    dim: int
    batch: int
    steps: int
    peers: bool
    config: Path | None = None
    """quality: YAML file of worlds, methods and seeds."""
    out: Path | None = None
    """quality, validity, million: output folder."""
    data: str | None = None
    """quality: PREFIX of the files PREFIX-train.npz and PREFIX-test.npz of a label set."""
    minutes: float | None = None
    """quality, validity: start no cell after this many minutes; million: of each method."""
    cells: tuple[str, ...] = ()
    """validity: patterns of names of the cells to run; all by default."""
    logs: int | None = None
    """validity: logs of each cell."""
    quick: bool = False
    """validity, million: a small run that shows that the suite works."""
    rows: int | None = None
    """million: rows of the log."""
    seeds: int = 1
    """million: worlds of each kind."""
    worlds: tuple[str, ...] = ()
    """million: all by default."""
    methods: tuple[str, ...] = ()
    """million: all by default."""
    say: Callable[[str], None] = lambda text: None
    """Called with each line of progress."""


Suite = Callable[[Settings], dict[str, Any]]
"""Runs the measurements, reports progress to `say` and returns the content of --json."""


def load_suite(name: str) -> Suite:
    """Import a suite.

    Raises:
        ConfigError: No suite has this name.
    """
    if name not in SUITES:
        raise ConfigError(f"unknown suite '{name}'; known: {', '.join(SUITES)}")
    suite: Suite = load_by_path(SUITES[name], f"suite '{name}'")
    return suite
