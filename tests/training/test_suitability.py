"""Towers that follow from the features, and notes on training that cannot work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from offtower import TwoTowerPolicyLearner
from offtower.config import Config, PolicyConfig, TowerConfig, config_fingerprint, parse_config
from offtower.data.encoding import FeatureEncoding
from offtower.data.log import TableLog
from offtower.data.schema import FeatureSpec
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_policy, save_policy
from offtower.models.towers import tower_of_features
from offtower.progress import Progress
from offtower.training.setup import build_setup, checked_objective
from offtower.training.suitability import suitability_notes
from offtower.training.workers import SINGLE_PROCESS
from tests.training.test_rewarded_rows import popularity_log

TABLE = pa.table({"a": ["x", "y"], "b": pa.array([["u"], []]), "c": [1.0, 2.0]})
SPECS = {"a": "category", "b": "bag", "c": "numeric"}


def encoding(names: str) -> FeatureEncoding:
    return FeatureEncoding.fit([FeatureSpec(name=k, kind=SPECS[k]) for k in names], [TABLE])  # type: ignore[arg-type]


@pytest.mark.parametrize(("features", "linear"), [("a", True), ("b", True), ("c", False)])
def test_layers_follow_from_the_features(features: str, linear: bool) -> None:
    found = tower_of_features(TowerConfig(), encoding(features))
    expected = ((), "output", "root") if linear else ((64, 64), "input", "mean")
    assert (found.hidden_layer_sizes, found.tables, found.bag) == expected
    # Several features may interact, which takes layers; sizes that are given stay.
    both = tower_of_features(TowerConfig(), encoding("ab"))
    assert both.hidden_layer_sizes == (64, 64) and both.tables == "input"
    given = TowerConfig(hidden_layer_sizes=(8,))
    assert tower_of_features(given, encoding(features)) == given


def test_the_stored_policy_names_its_layers(tmp_path: Path) -> None:
    policy = TwoTowerPolicy(PolicyConfig(), encoding("b"), encoding("c"))
    save_policy(tmp_path / "policy", policy, {})
    text = json.dumps(json.loads((tmp_path / "policy" / "policy.json").read_text()))
    assert '"hidden_layer_sizes": []' in text and '"hidden_layer_sizes": [64, 64]' in text
    assert load_policy(tmp_path / "policy")[0].config == policy.config


ENOUGH = {"training": {"epochs": 100, "batch_size": 64}}


def notes(objective: str, described: bool, **sections: object) -> list[str]:
    config: Config = parse_config(
        {
            "name": "x",
            "data": {"train": "m", "catalogue": "m"},
            "objective": {"name": objective},
            **sections,
        }
    )
    data = popularity_log(described)
    return list(suitability_notes(config, checked_objective(config, data), data))


def test_regression_on_rarely_rewarded_ids_is_reported() -> None:
    (note,) = notes("regression", described=False, **ENOUGH)
    assert note.startswith("objective 'regression' learns each item from its own rewarded rows")
    assert "of 200 items" in note and "objective.name=auto or weighted_likelihood" in note
    assert notes("weighted_likelihood", described=False, **ENOUGH) == []
    assert notes("regression", described=True, **ENOUGH) == []


def test_layers_behind_a_single_feature_are_reported() -> None:
    policy = {"item_tower": {"hidden_layer_sizes": [8]}}
    (note,) = notes("clipped_ips", described=False, policy=policy, **ENOUGH)
    assert note.startswith("policy.item_tower.hidden_layer_sizes=[8] stands between")
    assert "'item_id'" in note and note.endswith("leave it null")
    assert notes("clipped_ips", described=True, policy=policy, **ENOUGH) == []


def test_a_temperature_that_leaves_scores_uniform_is_reported() -> None:
    flat = {"policy": {"temperature": 1.0}}
    (note,) = notes("implicit_squares", described=False, **flat, **ENOUGH)
    assert "softmax at temperature 1 is nearly uniform: set policy.temperature=0.05" in note
    assert notes("implicit_squares", described=False, **ENOUGH) == []
    biased = {"policy": {"item_bias": True}}
    assert len(notes("implicit_squares", described=False, **biased, **ENOUGH)) == 1


@pytest.mark.parametrize(
    ("objective", "temperature"),
    [("regression", 0.1), ("implicit_squares", 0.05), ("weighted_likelihood", 1.0)],
)
def test_fits_without_temperature_have_a_small_one(objective: str, temperature: float) -> None:
    config = parse_config(
        {"name": "x", "data": {"train": "m", "catalogue": "m"}, "objective": objective}
    )
    assert config.policy.temperature is None
    data = popularity_log(described=False)
    setup = build_setup(config, data, None, SINGLE_PROCESS, Progress())
    assert setup.policy.temperature == setup.policy.config.temperature == temperature
    given = replace(config, policy=replace(config.policy, temperature=2.0))
    assert build_setup(given, data, None, SINGLE_PROCESS, Progress()).policy.temperature == 2.0
    # Runs of before null was possible have the number in their configuration.
    number = replace(config, policy=replace(config.policy, temperature=temperature))
    assert config_fingerprint(number) == config_fingerprint(config)
    assert config_fingerprint(given) != config_fingerprint(config)


def test_too_few_steps_are_reported_with_enough() -> None:
    (note,) = notes("weighted_likelihood", described=True)
    assert note.startswith("training.epochs=20 of 500 rows are only 20 steps of 1024 rows")
    assert "training.batch_size=32 and training.epochs=25" in note
    assert (
        notes("weighted_likelihood", described=True, training={"batch_size": 32, "epochs": 25})
        == []
    )


def test_too_few_steps_of_the_reward_model_are_reported() -> None:
    model = {"reward_model": {"kind": "factored"}}
    (note,) = notes("clipped_dr", described=True, **model, **ENOUGH)
    assert note.startswith("reward_model.epochs=20 of 500 rows are only 20 steps of 1024 rows")
    assert "reward_model.batch_size=32 and reward_model.epochs=25" in note
    assert notes("clipped_ips", described=True, **model, **ENOUGH) == []


def test_auto_is_not_proposed_without_propensities() -> None:
    content = {"name": "t", "objective": {"name": "auto"}, "data": {"train": "m", "catalogue": "m"}}
    config = parse_config(content)
    data = popularity_log(described=False)
    log = data.train
    assert isinstance(log, TableLog)
    plain = TableLog(log.table.drop(["pscore"]), replace(log.schema, pscore=None))
    found = list(
        suitability_notes(config, checked_objective(config, data), replace(data, train=plain))
    )
    assert len(found) == 2 and not any("auto" in note for note in found)


def test_the_learner_reports_them(capsys: pytest.CaptureFixture[str]) -> None:
    feedback = {
        "context": [[0.0], [1.0]] * 4,
        "action": [0, 1] * 4,
        "reward": [1.0, 0.0] * 4,
        "pscore": [0.5] * 8,
        "action_context": [[0.0], [1.0]],
    }
    TwoTowerPolicyLearner(objective="ips", epochs=1).fit(feedback)
    assert "note: training.epochs=1 of 8 rows are only 1 steps" in capsys.readouterr().err
