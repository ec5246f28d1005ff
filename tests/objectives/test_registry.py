"""Objectives by name, and what is said about wrong names and settings."""

from __future__ import annotations

import pytest

from offtower.errors import ConfigError
from offtower.objectives import IPS, OBJECTIVES, ClippedIPS, make_objective


def test_every_registered_name_is_made() -> None:
    for name, kind in OBJECTIVES.items():
        assert isinstance(make_objective(name), kind)
        assert kind.name == name


def test_settings_reach_the_objective() -> None:
    objective = make_objective("clipped_ips", {"max_weight": 7})
    assert isinstance(objective, ClippedIPS)
    assert objective.max_weight == 7.0


def test_import_path() -> None:
    assert isinstance(make_objective("offtower.objectives.ips:IPS"), IPS)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("clipped_isp", {}, "Did you mean 'clipped_ips'"),
        ("ips", {"max_weight": 3}, "does not take these settings"),
        ("clipped_ips", {"max_weight": -1}, "'max_weight' must be a positive number, got -1"),
        ("clipped_dr", {"max_weight": float("nan")}, "positive number"),
        ("no.such.module:Thing", {}, "does not import"),
        ("offtower.objectives:Nothing", {}, "has no 'Nothing'"),
        ("offtower.errors:DataError", {}, "not a subclass"),
        ("regression", {"loss": "hinge"}, "cross_entropy or squared_error"),
    ],
)
def test_mistakes_are_explained(name: str, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_objective(name, arguments)
