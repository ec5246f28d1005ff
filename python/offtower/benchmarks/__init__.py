"""Measurements that an installation can make of itself: `offtower benchmark SUITE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offtower.errors import ConfigError
from offtower.imports import load_by_path

SUITES: Mapping[str, str] = {
    "ops": "offtower.benchmarks.operators:run",
    "train": "offtower.benchmarks.train:run",
    "memory": "offtower.benchmarks.memory:run",
    "quality": "offtower.benchmarks.quality.suite:run",
}
"""Suite -> import path of a `Suite`. Another one is one more line here."""


@dataclass(frozen=True)
class Settings:
    """What every suite takes."""

    items: tuple[int, ...]
    dim: int
    batch: int
    steps: int
    peers: bool
    config: Path | None = None
    """quality: which worlds, methods and seeds."""
    out: Path | None = None
    """quality: folder of results."""
    data: str | None = None
    """quality: beginning of the file names of a label set."""
    minutes: float | None = None
    """quality: begin nothing new after so long."""
    say: Callable[[str], None] = lambda text: None
    """Where lines for people go, as soon as they are known."""


Suite = Callable[[Settings], dict[str, Any]]
"""Measures, tells `say`, and returns what --json prints."""


def load_suite(name: str) -> Suite:
    """The suite called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in SUITES:
        raise ConfigError(f"unknown suite '{name}'; known: {', '.join(SUITES)}")
    suite: Suite = load_by_path(SUITES[name], f"suite '{name}'")
    return suite
