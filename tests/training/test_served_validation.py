"""Validation during training scores the policy as it is served, in both strategies."""

from __future__ import annotations

from pathlib import Path

import pytest

from offtower.crossfit.reward_model import obtain_reward_model
from offtower.errors import ConfigError
from offtower.prepare import open_data
from offtower.progress import Progress
from offtower.training.setup import build_setup
from offtower.training.validation import ValidationScore
from offtower.training.workers import SINGLE_PROCESS
from tests.training.conftest import make_config


def validation(folder: Path, runs: Path, *overrides: str) -> ValidationScore:
    """The score of the untrained policy, by dr."""
    config = make_config(
        folder, runs, "a", "training.validation_estimator=dr", "reward_model.epochs=1", *overrides
    )
    data = open_data(config, Progress())
    model = obtain_reward_model(
        config.reward_model, data, config.seed, Progress(), for_new_rows=True
    )
    setup = build_setup(config, data, model, SINGLE_PROCESS, Progress())
    assert setup.validate is not None
    return setup.validate(setup.policy)


def test_sharded_items_are_validated_as_they_are_served(simulated: Path, tmp_path: Path) -> None:
    sharded = "training.strategy=item_sharded"
    scores = {}
    for serving in ("serving.uniform=0.0", "serving.uniform=0.3", "serving.temperature=0.2"):
        setting = (serving, "policy.item_bias=true", "policy.temperature=0.3")
        whole = validation(simulated, tmp_path, *setting)
        parts = validation(simulated, tmp_path, *setting, sharded)
        assert parts.value == pytest.approx(whole.value, rel=1e-5)
        assert parts.effective_sample_size == pytest.approx(whole.effective_sample_size, rel=1e-4)
        scores[serving] = whole.effective_sample_size
    assert len({round(size, 2) for size in scores.values()}) == 3
    for refused in ("serving.top=3", "serving.mode=top_k"):
        with pytest.raises(ConfigError, match="item_sharded cannot search"):
            validation(simulated, tmp_path, refused, sharded)
