"""Cases that once failed, and a few of every target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, run_case

FAILED_ONCE = json.loads((Path(__file__).parent / "seeds.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_twenty_cases_of_each_target(target: str, tmp_path: Path) -> None:
    for seed in range(20):
        run_case(target, seed, tmp_path / "case")


@pytest.mark.parametrize(("target", "seed"), FAILED_ONCE)
def test_cases_that_once_failed(target: str, seed: int, tmp_path: Path) -> None:
    run_case(target, seed, tmp_path / "case")
