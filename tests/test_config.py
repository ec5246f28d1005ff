"""Configurations: reading, overriding, refusing."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from offtower.config import (
    apply_overrides,
    config_fingerprint,
    load_config,
    parse_config,
    settings_fingerprint,
    to_dict,
    to_yaml,
)
from offtower.errors import ConfigError, RunError
from offtower.run_directory import RunDirectory

MINIMAL = {"name": "a", "data": {"train": "log/train", "catalogue": "items"}}


def test_minimal_file_gets_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(path)
    assert config.run_directory == Path("runs/a")
    assert config.training.epochs == 20


def test_yaml_round_trip() -> None:
    config = parse_config(MINIMAL)
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trainig": {}}, "unknown key 'trainig'; did you mean 'training'?"),
        ({"training": {"epoch": 3}}, "unknown key 'training.epoch'; did you mean 'epochs'?"),
        ({"training": {"zzzzz": 3}}, "unknown key 'training.zzzzz'; known: epochs"),
        ({"evaluation": {"reward_model": {"fold": 1}}}, "did you mean 'folds'?"),
        ({"policy": {"item_tower": {"activation": "swish"}}}, "'policy.item_tower.activation'"),
        ({"training": {"epochs": "many"}}, "'training.epochs' = 'many'"),
        ({"training": {"epochs": 0}}, "greater than or equal to 1"),
        ({"incremental": {"replay": {"logs": "a"}}}, "replay.logs' = 'a': must be a list"),
        ({"policy": {"temperature": float("nan")}}, "'policy.temperature'"),
        ({"policy": {"temperature": 0.0}}, "greater than 0"),
        ({"data": {"catalogue": "x"}}, "'data.train' is required"),
    ],
)
def test_errors_name_the_key(content: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, **content}, source="c.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("c.yaml: ")


@pytest.mark.parametrize("name", ["auto", "clipped_ips", "my.package:Objective"])
def test_an_objective_may_be_its_name_alone(name: str) -> None:
    short = parse_config({**MINIMAL, "objective": name})
    assert short == parse_config({**MINIMAL, "objective": {"name": name}})
    assert parse_config(yaml.safe_load(to_yaml(short))) == short
    # An override of one of its keys finds a section.
    changed = parse_config(apply_overrides({**MINIMAL, "objective": name}, ["objective.kl=0.5"]))
    assert (changed.objective.name, changed.objective.kl) == (name, 0.5)
    assert parse_config(apply_overrides(MINIMAL, [f"objective={name}"])) == short


@pytest.mark.parametrize("value", [5, True, None, ["auto"], 1.5])
def test_an_objective_that_is_no_name_is_explained(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "objective": value}, source="c.yaml")
    text = str(caught.value)
    assert text.startswith(
        f"c.yaml: 'objective' = {value!r}: must be a name, such as objective: auto"
    )
    assert "keys name, arguments, kl" in text
    with pytest.raises(ConfigError, match=r"'training' = .*: must be a section with .* epochs"):
        parse_config({**MINIMAL, "training": value if value != ["auto"] else "fast"})


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n- 2\n", "top level is a list"), ("a: [", "not valid YAML"), ("\xff", "required")],
)
def test_invalid_files_raise(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=message if text != "\xff" else "cannot be read"):
        load_config(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file at"):
        load_config(tmp_path / "none.yaml")


def test_overrides_are_yaml_and_dotted() -> None:
    changed = apply_overrides(
        MINIMAL, ["training.epochs=5", "policy.item_bias=true", "training.gradient_clip=null"]
    )
    config = parse_config(changed)
    assert config.training.epochs == 5
    assert config.policy.item_bias is True
    assert config.training.gradient_clip is None
    assert MINIMAL == {"name": "a", "data": {"train": "log/train", "catalogue": "items"}}


@pytest.mark.parametrize(
    ("override", "message"),
    [("training.epochs", "must look like"), ("name.x=1", "'name' is a value"), ("a=[", "YAML")],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(MINIMAL, [override])


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_any_override_is_taken_or_explained(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_config(apply_overrides(MINIMAL, [text]))


def test_fingerprint_ignores_location_and_evaluation_but_not_learning() -> None:
    base = config_fingerprint(parse_config(MINIMAL))
    same = parse_config(apply_overrides(MINIMAL, ["runs=other", "evaluation.confidence=0.9"]))
    other = parse_config(apply_overrides(MINIMAL, ["seed=1"]))
    assert config_fingerprint(same) == base
    assert config_fingerprint(other) != base


def test_fingerprints_stay_those_of_stored_runs() -> None:
    # As written before histories existed: with another one no stored run can be opened.
    base, learned = parse_config(MINIMAL), "policy.context_tower.history.encoder=attention"
    assert config_fingerprint(base)[:16] == "328a6ffb5da5c507"
    assert settings_fingerprint(base)[:16] == "9a0ae1412703e8ed"
    other = parse_config(apply_overrides(MINIMAL, [learned]))
    assert config_fingerprint(other) != config_fingerprint(base)


def test_a_run_is_no_address() -> None:
    with pytest.raises(ConfigError, match=r"'runs' = .*written to a folder; .*--mirror"):
        parse_config(apply_overrides(MINIMAL, ["runs=s3://bucket/runs"]))


def test_dataclass_and_dump_agree() -> None:
    config = parse_config(MINIMAL)
    assert to_dict(config)["training"]["epochs"] == asdict(config)["training"]["epochs"]


def test_credentials_are_not_written() -> None:
    text = "tracking.mlflow=https://me:SECRET@host/x"
    config = parse_config(apply_overrides(MINIMAL, [text]))
    assert "SECRET" not in to_yaml(config) and "https://***@host/x" in to_yaml(config)
    # Workers of this process get them.
    assert to_dict(config)["tracking"]["mlflow"] == "https://me:SECRET@host/x"
    stored = parse_config(yaml.safe_load(to_yaml(config)))
    assert config_fingerprint(stored) == config_fingerprint(config)


ALIAS_BOMB = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 10))
    for level in range(1, 30)
)
"""30 lines that stand for 10^29 values."""


@pytest.mark.parametrize(
    "content",
    [
        b"name: \xff",
        b"name: [",
        b"name: a\x00",
        b"seed: 2024-99-99",
        b"2024-01-01: 1",
        b"name: " + b"[" * 5000,
        b"a: &a [*a]",
        b"- 1",
        b"%YAML 9.9.9\n---\n",
        ALIAS_BOMB,
    ],
)
def test_damage_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(path)
    with pytest.raises(RunError, match=r"config\.yaml"):
        RunDirectory(tmp_path).load_config()
