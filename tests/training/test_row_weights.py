"""Training on a log with row weights: gradients against repeated rows, and the log's schema."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from offtower.config import parse_config
from offtower.data import LogSchema, write_catalogue, write_log
from offtower.data.check import BadRowsError
from offtower.data.log import ParquetLog, TableLog
from offtower.data.reader import scan
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.errors import ConfigError
from offtower.evaluation.run import evaluate_runs
from offtower.objectives import ItemScores, LoggedRows, Reduction, make_objective
from offtower.ops import PolicyTerms
from offtower.training.run import train_run


def logged(u: torch.Tensor, index: np.ndarray, *, scores: bool) -> LoggedRows:
    rng = np.random.default_rng(0)
    n = 12
    reward, pscore = (torch.tensor(rng.random(n)) for _ in range(2))
    q, m = torch.tensor(rng.random(n)), torch.tensor(rng.random(n))
    log_prob = torch.log_softmax(u, dim=1)[:, 0]
    where = torch.from_numpy(index)
    terms = PolicyTerms(
        log_prob=log_prob[where],
        log_normalizer=torch.logsumexp(u, dim=1)[where],
        entropy=None,
        expected_reward=(m * u.sigmoid()[:, 1])[where],
        action_reward=q[where],
    )
    return LoggedRows(reward[where], ItemScores(u[where, 0]) if scores else terms, pscore[where])


@pytest.mark.parametrize("name", ["ips", "snips", "dr", "clipped_ips", "regression"])
def test_a_weight_of_k_trains_as_k_rows(name: str) -> None:
    objective = make_objective(name, {"loss": "squared_error"} if name == "regression" else {})
    weight = np.random.default_rng(1).integers(1, 5, 12)
    mean = weight.mean()
    gradients = []
    for index, reduction in (
        (np.arange(12), Reduction(12, row_weight=torch.tensor(weight / mean))),
        (np.repeat(np.arange(12), weight), Reduction(int(weight.sum()))),
    ):
        u = torch.tensor(np.random.default_rng(2).normal(size=(12, 3)), requires_grad=True)
        value = objective(logged(u, index, scores=name == "regression"), reduction)
        value.loss.backward()
        gradients.append((value.value.item(), u.grad))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-12)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-10, atol=1e-14)


def test_encoded_rows_have_the_inverse_sampling_rate() -> None:
    world = SimulatedWorld(20, WorldSettings(4, 4, 4), seed=1)
    table = pa.concat_tables(world.log(50, seed=0))
    table = table.append_column("kept", pa.array(np.full(50, 0.25)))
    schema = replace(world.log_schema, weight="kept")
    from offtower.data import Catalogue
    from offtower.data.encoding import FeatureEncoding

    catalogue = Catalogue.from_table(world.catalogue_table(), world.catalogue_schema)
    encoding = FeatureEncoding.fit(schema.context, [table])
    (rows,) = scan(TableLog(table, schema), catalogue, encoding, 64)
    assert rows.row_weight is not None and set(rows.row_weight) == {4.0}
    as_weights = TableLog(table, replace(schema, weight_kind="weight"))
    (rows,) = scan(as_weights, catalogue, encoding, 64)
    assert rows.row_weight is not None and set(rows.row_weight) == {0.25}
    bad = table.set_column(table.num_columns - 1, "kept", pa.array(np.full(50, 1.5)))
    with pytest.raises(BadRowsError, match=r"a sampling rate in \(0, 1\]"):
        list(scan(TableLog(bad, schema), catalogue, encoding, 64))


def test_slates_have_no_row_weights() -> None:
    content: dict[str, Any] = {"position": "k", "round_id": "r", "pscore_kind": "conditional"}
    with pytest.raises(ConfigError, match="slates cannot have weights"):
        LogSchema.from_dict({**content, "weight": "w"})


def test_a_down_sampled_log_is_trained_and_evaluated(tmp_path: Path) -> None:
    """Rewarded rows and a tenth of the others: the mean reward is that of the whole log."""
    world = SimulatedWorld(30, WorldSettings(4, 4, 4, intercept=-1.5), seed=1)
    write_catalogue(tmp_path / "catalogue", world.catalogue_table(), world.catalogue_schema)
    schema = replace(world.log_schema, weight="kept")
    means = {}
    for seed, name in enumerate(("train", "test")):
        whole = pa.concat_tables(world.log(6000, seed=seed))
        reward = whole.column("reward").to_numpy()
        share = np.where(reward > 0, 1.0, 0.1)
        kept = np.random.default_rng(seed).random(6000) < share
        table = whole.append_column("kept", pa.array(share)).filter(pa.array(kept))
        write_log(tmp_path / name, [table], schema)
        means[name] = reward.mean(), table.column("reward").to_numpy().mean()
    content: dict[str, Any] = {
        "name": "a",
        "runs": str(tmp_path / "runs"),
        "data": {k: str(tmp_path / k) for k in ("train", "test", "catalogue")},
        "policy": {"embedding_dim": 4},
        "objective": {"name": "dr"},
        "reward_model": {"kind": "factored", "embedding_dim": 4, "folds": 2, "epochs": 2},
        "training": {"epochs": 2, "batch_size": 256, "threads": 1},
    }
    train_run(parse_config(content))
    found = evaluate_runs([tmp_path / "runs" / "a"])
    whole_mean, kept_mean = means["test"]
    logging = found.result.logging.estimate
    # Four standard errors of a fixed draw; the unweighted mean is far outside.
    assert abs(logging.value - whole_mean) < 4 * logging.std_error
    assert kept_mean - whole_mean > 20 * logging.std_error
    with pytest.raises(ConfigError, match="no form for rows with weights"):
        evaluate_runs([tmp_path / "runs" / "a"], select="all")
    auto = {**content, "name": "auto", "objective": {"name": "auto"}}
    with pytest.raises(ConfigError, match="auto has no form for rows with weights"):
        train_run(parse_config(auto))
    assert ParquetLog.open(tmp_path / "train").schema.weight == "kept"
