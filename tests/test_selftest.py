"""`offtower doctor --selftest` passes here, and fails where something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offtower import selftest
from offtower.errors import OfftowerError
from offtower.ops import available_instruction_sets


def test_every_check_passes_on_this_machine(tmp_path: Path) -> None:
    checks = list(selftest.run_selftest(tmp_path))
    assert [one.detail for one in checks if not one.passed] == []
    names = " ".join(one.name for one in checks)
    assert "kill and resume" in names and "damage" in names
    assert all(isa in names for isa in (*available_instruction_sets(), "reference"))


def test_a_wrong_operator_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = selftest.policy_terms

    def wrong(*args: object, **kwargs: object) -> object:
        terms = right(*args, **kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            terms.log_prob.mul_(1.001)
        return terms

    monkeypatch.setattr(selftest, "policy_terms", wrong)
    with pytest.raises(OfftowerError, match="relative error"):
        selftest.check_operators("reference", torch.float32, "cpu")


def test_a_missing_file_check_is_reported(tmp_path: Path) -> None:
    """Without a policy to damage, the check of damage fails instead of passing."""
    one = selftest.timed_check("damage", lambda: selftest.check_damage_is_refused(tmp_path))
    assert not one.passed
