"""Reward models of slates: rewards fall with the position, not with the item."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from offtower.config import parse_config
from offtower.crossfit.reward_model import fit_reward_model
from offtower.data import FeatureSpec, LogSchema, write_catalogue, write_log
from offtower.data.schema import CatalogueSchema
from offtower.models.reward.examination import Examination
from offtower.objectives import LoggedRows, Reduction, SlateObjective, SlateRows, make_objective
from offtower.prepare import open_data
from offtower.progress import Progress

from .test_objectives import REWARD_MODEL, WORLD, logged_rows
from .worlds import ITEMS, POSITIONS, SLATES, conditionals, softmax

THETA = np.array([1.0, 0.6, 0.3])


@pytest.mark.parametrize("binary", [True, False])
def test_loss_is_that_of_the_product(binary):
    examination = Examination(THETA)
    logit, position = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0, 1, 7])
    reward = torch.tensor([1.0, 0.0, 1.0])
    found = examination.loss(logit, reward, position, binary=binary)
    factor = torch.tensor([1.0, 0.6, 0.3])
    if binary:
        p = factor * logit.sigmoid()
        expected = -(reward * p.log() + (1 - reward) * (1 - p).log())
    else:
        expected = (factor * logit - reward) ** 2
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_factors_and_items_are_told_apart(tmp_path):
    # The logging policy puts the best items on top: without positions their rewards look larger.
    rng, rounds = np.random.default_rng(0), 4000
    p = softmax(np.linspace(2.0, -2.0, ITEMS))
    q = np.linspace(0.8, 0.2, ITEMS)
    slate = SLATES[rng.choice(len(SLATES), size=rounds, p=conditionals(p).prod(axis=1))]
    reward = (rng.random(slate.shape) < q[slate] * THETA).astype(float)
    table = pa.table(
        {
            "x": np.repeat(rng.normal(size=rounds), POSITIONS),
            "action": slate.reshape(-1),
            "reward": reward.reshape(-1),
            "pscore": np.full(slate.size, 0.5),
            "round": np.repeat(np.arange(rounds), POSITIONS),
            "position": np.tile(np.arange(POSITIONS), rounds),
        }
    )
    schema = LogSchema(
        context=(FeatureSpec(name="x", kind="numeric"),),
        position="position",
        round_id="round",
        pscore_kind="conditional",
    )
    write_log(tmp_path / "log", [table], schema)
    items = CatalogueSchema(features=(FeatureSpec(name="item_id", kind="category"),))
    write_catalogue(tmp_path / "items", pa.table({"item_id": np.arange(ITEMS)}), items)
    config = parse_config(
        {
            "name": "run",
            "data": {"train": str(tmp_path / "log"), "catalogue": str(tmp_path / "items")},
            "reward_model": {
                "kind": "factored",
                "folds": 1,
                "epochs": 6,
                "learning_rate": 0.02,
                "batch_size": 256,
            },
        }
    )
    data = open_data(config, Progress())
    model = fit_reward_model(config.reward_model, data, 0, Progress())
    # Standard errors of the factors are below .02; of a rarely shown item's q about .04.
    assert model.factors.tolist() == pytest.approx(THETA.tolist(), abs=0.08)
    (rows, *_) = data.scan(300)
    found = torch.sigmoid(
        model.for_new_rows(rows).context @ model.for_new_rows(rows).item.T
        + model.for_new_rows(rows).item_bias
    )
    assert found.mean(0)[:4].tolist() == pytest.approx(q[:4].tolist(), abs=0.1)
    assert model.examination(rows).tolist() == pytest.approx(
        model.factors[torch.from_numpy(rows.position)].tolist()
    )
    model.save(tmp_path)
    assert "examination" in (tmp_path / "factored.json").read_text()


def test_objectives_multiply_both_predictions():
    logits = torch.from_numpy(np.log(WORLD.target))
    x, slate, reward = WORLD.draw(6, np.random.default_rng(0))
    rows = logged_rows(logits, x, slate, reward, model=True)
    factor = torch.from_numpy(np.tile(THETA, 6))
    objective = SlateObjective(make_objective("dr"), "conditional")
    found = objective(
        LoggedRows(
            rows.reward,
            terms=rows.terms,
            pscore=rows.pscore,
            slates=SlateRows(rows.slates.rounds, factor),
        ),
        Reduction(6),
    )
    value = 0.0
    for i in range(6):
        p, q, shown = WORLD.target[x[i]], REWARD_MODEL[x[i]], SLATES[slate[i]]
        pi_e, pi_0 = conditionals(WORLD.target), conditionals(WORLD.logging)
        ratio = pi_e[x[i], slate[i]] / pi_0[x[i], slate[i]]
        for k in range(POSITIONS):
            left = [a for a in range(ITEMS) if a not in shown[:k]]
            value += ratio[: k + 1].prod() * (reward[i, k] - THETA[k] * q[shown[k]])
            value += ratio[:k].prod() * THETA[k] * (p[left] @ q[left]) / p[left].sum()
    assert found.value.item() == pytest.approx(value / 6, abs=1e-10)
