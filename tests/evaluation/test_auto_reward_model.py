"""The regression that objective=auto fits, as the reward model of its evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.encoding import to_tensors
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.evaluation.run import evaluate_runs
from offtower.evaluation.run_loading import open_run
from offtower.evaluation.scoring.reward_models import RewardModelProvider
from offtower.models.store import load_policy
from offtower.prepare import open_data
from offtower.progress import Progress
from offtower.training.run import train_run


def test_evaluation_reads_the_regression_of_auto(tmp_path: Path) -> None:
    world = SimulatedWorld(12, WorldSettings(4, 4, 4, intercept=0.0), seed=1)
    write_catalogue(tmp_path / "catalogue", world.catalogue_table(), world.catalogue_schema)
    for seed, (name, rows) in enumerate((("train", 2000), ("test", 1500))):
        write_log(tmp_path / name, world.log(rows, seed=seed), world.log_schema)
    config = parse_config(
        {
            "name": "a",
            "runs": str(tmp_path / "runs"),
            "data": {key: str(tmp_path / key) for key in ("train", "test", "catalogue")},
            "policy": {"embedding_dim": 4},
            "objective": {"name": "auto"},
            "auto": {"candidates": ["regression_linear"], "epochs": 4, "folds": 2},
            "training": {"threads": 1},
        }
    )
    train_run(config)
    path = tmp_path / "runs" / "a"
    found = evaluate_runs([path])
    estimates = found.result.policies["a"].estimates
    assert set(estimates) == {"ips", "snips", "dm", "dr"} and found.result.decide_by == "dr"
    # Its predictions are the stored policy's logits, the mean of the members', through the link.
    data = open_data(config, Progress(), path)
    run = open_run(path, data.catalogue)
    model = RewardModelProvider([run], config).main()
    assert model is not None
    rows = next(iter(data.scan(64)))
    q = model.on(rows).at(torch.from_numpy(rows.action)[:, None])[:, 0]
    towers, facts = load_policy(run.directory.auto_reward_model)
    assert facts["candidate"] == "regression_linear" and facts["link"] == "sigmoid"
    with torch.no_grad():
        item = data.items.at(torch.from_numpy(rows.action))
        context = to_tensors(rows.context, data.device)
        product, bias = towers.action_logit(context, item), towers.embed_items(data.items).bias
        assert bias is not None
        bias = bias[torch.from_numpy(rows.action)]
    # Products of two joined members, whose mean is the prediction; biases are joined as means.
    assert towers.temperature == pytest.approx(2.0)
    logit = (product - bias) / 2.0 + bias
    np.testing.assert_allclose(q, torch.sigmoid(logit).numpy(), rtol=1e-5)
    # It predicts the rewards, so that DR is more precise than IPS.
    assert estimates["dr"].estimate.std_error < estimates["ips"].estimate.std_error
    without = evaluate_runs([path], overrides=["evaluation.reward_model={kind: none}"])
    assert set(without.result.policies["a"].estimates) == {"ips", "snips"}
