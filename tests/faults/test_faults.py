"""A bounded campaign; `python -m tests.faults` runs a larger one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.faults.campaign import BAD, Outcome, campaign, inject
from tests.faults.damage import Fault
from tests.faults.world import Subject, build, subjects


@pytest.mark.filterwarnings("ignore")
def test_no_fault_changes_a_result_silently(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    build(tmp_path, full=False)
    chosen = [one for one in subjects() if one.paths(tmp_path)]
    assert len(chosen) == len(subjects()) - 2
    found = list(campaign(tmp_path, chosen, number=40, seed=1))
    assert not [str(one) for one in found if one.outcome in BAD]
    assert sum(one.outcome is Outcome.REFUSED for one in found) > 20


def test_the_harness_finds_what_it_looks_for(tmp_path: Path) -> None:
    """A reader without checks changes its result, and one that breaks is a traceback."""
    path = tmp_path / "numbers"
    path.write_text("123")
    silent = Subject("text", ("*",), lambda root: (root / "numbers").read_text())
    flip = Fault("flip", 0)
    assert flip.apply(b"123") == b"023"
    assert inject(tmp_path, silent, path, flip, "123").outcome is Outcome.SILENT
    broken = Subject("number", ("*",), lambda root: int((root / "numbers").read_text()))
    assert inject(tmp_path, broken, path, Fault("truncate", 0), 123).outcome is Outcome.TRACEBACK
    assert path.read_text() == "123"
    rng = np.random.default_rng(0)
    drawn = [Fault.draw(rng, 4) for _ in range(200)]
    assert {one.position for one in drawn if one.kind == "flip"} == set(range(32))
    assert {one.position for one in drawn if one.kind == "truncate"} == set(range(4))
