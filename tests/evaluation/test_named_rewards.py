"""Several named rewards: their weighted sum decides, and each is evaluated beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest
from rich.console import Console

from offtower.cli.tables import rewards_table
from offtower.config import parse_config
from offtower.data import LogSchema
from offtower.data.check import BadRowsError
from offtower.data.ingest import IngestSource, Split, ingest_files
from offtower.data.log import ParquetLog
from offtower.errors import ConfigError, DataError, OfftowerError
from offtower.evaluation import EvaluationRows, evaluate_rows
from offtower.evaluation import estimators as e
from offtower.evaluation.estimators import Difference, MeanReward
from offtower.evaluation.intervals.methods import normal_interval
from offtower.evaluation.report import write_report
from offtower.evaluation.run import evaluate_runs
from offtower.training.run import train_run

NAMES = ("click", "revenue")


def rows(n: int = 400, seed: int = 0, **more: Any) -> EvaluationRows:
    rng = np.random.default_rng(3)
    rewards = np.stack([(rng.random(n) < 0.4) * 1.0, rng.exponential(size=n)], axis=1)
    weight = np.random.default_rng(seed).exponential(size=n)
    return EvaluationRows(weight, rewards @ [1.0, 0.1], rewards=rewards, row=np.arange(n), **more)


@pytest.mark.parametrize("weighted", [False, True])
def test_each_reward_is_the_estimate_of_rows_with_this_reward(weighted: bool) -> None:
    more = {"row_weight": np.random.default_rng(9).uniform(1, 3, 400)} if weighted else {}
    policies = {"a": rows(seed=1, **more), "b": rows(seed=2, **more)}
    found = evaluate_rows(
        policies,
        ["ips", "snips"],
        reward_range=(0.0, 100.0),
        reward_names=NAMES,
        intervals=("normal",),
    )
    for name, policy in policies.items():
        assert policy.rewards is not None
        for i, reward in enumerate(NAMES):
            one = replace(policy, reward=policy.rewards[:, i], rewards=None)
            result = found.policies[name].rewards[reward]
            wanted = e.SNIPS().estimate(one)
            assert result.name == "snips"
            assert result.estimate.value == pytest.approx(wanted.value, rel=1e-12)
            assert result.estimate.std_error == pytest.approx(wanted.std_error, rel=1e-9)
            gap = Difference(e.SNIPS(), MeanReward())
            interval = normal_interval(gap, gap.statistics(one, one))
            assert result.difference is not None
            assert result.difference.interval.low == pytest.approx(interval.low, rel=1e-9)
            logging = found.logging_rewards[reward].estimate
            assert logging.value == pytest.approx(MeanReward().estimate(one).value, rel=1e-12)
    # The weighted sum is the sum of the parts.
    parts = [found.policies["a"].rewards[name].estimate.value for name in NAMES]
    assert found.policies["a"].estimates["snips"].estimate.value == pytest.approx(
        parts[0] + 0.1 * parts[1], rel=1e-12
    )
    content = json.loads(json.dumps(found.to_dict()))
    assert set(content["logging_rewards"]) == set(content["policies"]["a"]["rewards"]) == set(NAMES)


def test_without_names_nothing_is_added() -> None:
    plain = replace(rows(), rewards=None)
    found = evaluate_rows({"a": plain}, ["ips"], reward_range=(0.0, 100.0)).to_dict()
    assert "logging_rewards" not in found and "rewards" not in found["policies"]["a"]
    with pytest.raises(OfftowerError, match="rows need 2 named rewards"):
        evaluate_rows({"a": plain}, reward_range=(0.0, 100.0), reward_names=NAMES)


def test_a_reward_model_predicts_the_sum_only() -> None:
    modeled = rows(action_reward=np.full(400, 0.3), expected_reward=np.full(400, 0.3))
    found = evaluate_rows({"a": modeled}, reward_range=(0.0, 100.0), reward_names=NAMES)
    assert found.decide_by == "dr" and found.policies["a"].rewards["click"].name == "snips"


SCHEMA = LogSchema.from_dict(
    {
        "context": [{"name": "age", "kind": "numeric"}],
        "action": "item",
        "reward": "value",
        "rewards": [
            {"name": "click", "weight": 1.0},
            {"name": "revenue", "column": "paid", "weight": 0.02},
        ],
        "reward_range": [0, 10],
        "pscore": "p",
    }
)


def log(n: int = 3000) -> dict[str, Any]:
    """Item 0 is clicked often and never bought; the others the other way round."""
    rng = np.random.default_rng(0)
    item = rng.integers(0, 4, n)
    click = (rng.random(n) < np.where(item == 0, 0.9, 0.1)) * 1.0
    paid = (rng.random(n) < np.where(item == 0, 0.0, 0.2)) * 10.0
    return {
        "age": rng.integers(20, 60, n),
        "item": [f"i{k}" for k in item],
        "click": click,
        "paid": paid,
        "p": np.full(n, 0.25),
    }


def source(folder: Path, content: dict[str, Any]) -> Path:
    pacsv.write_csv(pa.table(content), folder / "log.csv")
    return folder / "log.csv"


def test_ingest_makes_the_weighted_sum(tmp_path: Path) -> None:
    content = log(200)
    done = ingest_files(IngestSource(source(tmp_path, content), SCHEMA), tmp_path / "out")
    stored = ParquetLog.open(done.log)
    table = pa.concat_tables(stored.tables())
    np.testing.assert_allclose(
        table.column("value").to_numpy(), content["click"] + 0.02 * content["paid"], rtol=1e-15
    )
    assert stored.schema == SCHEMA


def test_ingest_refuses_what_has_no_sum(tmp_path: Path) -> None:
    content = log(40)
    null = pa.array([None, *content["paid"][1:]])
    with pytest.raises(BadRowsError, match="row 0 of the log: column 'value' is null"):
        ingest_files(
            IngestSource(source(tmp_path, {**content, "paid": null}), SCHEMA), tmp_path / "a"
        )
    twice = {**content, "value": content["click"]}
    with pytest.raises(DataError, match="name another one in `reward`"):
        ingest_files(IngestSource(source(tmp_path, twice), SCHEMA), tmp_path / "b")
    with pytest.raises(ConfigError, match="column of the weighted sum"):
        LogSchema.from_dict({"reward": "click", "rewards": [{"name": "click"}]})
    with pytest.raises(ConfigError, match="reward 'a' is named twice"):
        LogSchema.from_dict({"rewards": [{"name": "a"}, {"name": "a", "column": "b"}]})


def test_a_gain_in_clicks_bought_by_a_loss_in_revenue_is_seen(tmp_path: Path) -> None:
    """The weights favor clicks: the trained policy shows item 0, which nobody buys."""
    logs = tmp_path / "logs"
    ingest_files(IngestSource(source(tmp_path, log()), SCHEMA), logs, split=Split("row"))
    train_run(
        parse_config(
            {
                "name": "clicks",
                "runs": str(tmp_path / "runs"),
                "data": {p: str(logs / p) for p in ("train", "test", "catalogue")},
                "policy": {"embedding_dim": 4},
                "objective": {"name": "ips"},
                "training": {
                    "epochs": 6,
                    "batch_size": 128,
                    "learning_rate": 0.05,
                    "threads": 1,
                },
            }
        )
    )
    found = evaluate_runs([tmp_path / "runs" / "clicks"])
    rewards = found.result.policies["clicks"].rewards
    gaps = {name: rewards[name].difference for name in NAMES}
    assert gaps["click"] is not None and gaps["click"].interval.low > 0.2
    assert gaps["revenue"] is not None and gaps["revenue"].interval.high < -0.5
    assert any("loses in the reward 'revenue'" in note for note in found.notes)
    page = write_report(tmp_path / "report.html", [found], title="clicks", command="")
    html = page.read_text()
    assert "Each reward by itself" in html and "loses in the reward" in html
    console = Console(file=StringIO(), width=120)
    console.print(rewards_table(found))
    assert console.file.getvalue().count("revenue") == 1
