"""A log of slates that a policy served, evaluated with the policy that served it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.ingest import IngestSource, ingest_files
from offtower.data.log import ParquetLog
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.errors import ConfigError, OfftowerError
from offtower.evaluation.run import evaluate_runs
from offtower.retrieval import (
    ExportOptions,
    Retriever,
    decisions_table,
    export_run,
    served_schema,
)
from offtower.training.run import train_run
from tests.lighter import without_graphs
from tests.mappers import BACKWARDS

ROUNDS, K = 1500, 5


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """A run, the ingested log that it served, and its rewards (ROUNDS, K)."""
    folder = tmp_path_factory.mktemp("slates")
    world = SimulatedWorld(60, WorldSettings(6, 6, 6), seed=1)
    write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
    write_log(folder / "log", world.log(3000, seed=1), world.log_schema)
    config = parse_config(
        {
            "name": "run",
            "runs": str(folder / "runs"),
            "data": {"train": str(folder / "log"), "catalogue": str(folder / "catalogue")},
            "policy": {
                "embedding_dim": 8,
                "temperature": 0.3,
                "context_tower": {"hidden_layer_sizes": [16]},
                "item_tower": {"hidden_layer_sizes": [16]},
            },
            "reward_model": {"kind": "factored", "epochs": 2, "folds": 1},
            "objective": {"name": "weighted_likelihood"},
            "training": {"epochs": 5, "batch_size": 256, "learning_rate": 0.02},
        }
    )
    train_run(config)
    with without_graphs():
        export_run(config.run_directory, ExportOptions(index=None, contexts=200))
    retriever = Retriever.open(config.run_directory)
    contexts = world.contexts(ROUNDS, seed=5)
    contexts = contexts.append_column("user_id", pa.array(np.arange(ROUNDS)))
    shown = retriever.sample(contexts, K, seed=6)
    table = decisions_table(retriever, contexts, shown)
    mean = np.stack([world.expected_reward(contexts, shown.item[:, k]) for k in range(K)], 1)
    reward = (np.random.default_rng(7).random((ROUNDS, K)) < mean).astype(np.float64)
    schema = served_schema(retriever)
    table = table.append_column(schema.reward, pa.array(reward.reshape(-1)))
    pq.write_table(table.drop_columns(["pscore_error"]), folder / "served.parquet")
    source = IngestSource(
        folder / "served.parquet",
        schema,
        folder / "catalogue" / "part-00000.parquet",
        world.catalogue_schema,
    )
    done = ingest_files(source, folder / "taken")
    assert done.rows == ROUNDS * K
    return config.run_directory, Path(str(done.log)), reward


def test_every_position_has_weight_1_and_ips_equals_the_logged_mean(served) -> None:
    run, log, reward = served
    # batches of 512 rows end inside rounds of 5.
    found = evaluate_runs([run], log=log, overrides=["evaluation.batch_rows=512"])
    policy = next(iter(found.result.policies.values()))
    logged = reward.sum(axis=1).mean()
    assert found.result.n == ROUNDS
    assert found.result.logging.estimate.value == pytest.approx(logged, rel=1e-9)
    assert [one.n for one in policy.positions] == [ROUNDS] * K
    # The served policy is the evaluated one, so weights are 1 up to the rounding of float32.
    for one in policy.positions:
        assert one.mean == pytest.approx(1.0, abs=2e-5)
    assert policy.estimates["ips"].estimate.value == pytest.approx(logged, rel=5e-5)
    assert policy.estimates["snips"].estimate.value == pytest.approx(logged, rel=5e-5)
    gap = policy.estimates["dr"].estimate.value - logged
    assert abs(gap) < 4.0 * policy.estimates["dr"].estimate.std_error
    assert any("means over rounds" in note for note in found.notes)
    assert any("dm left out" in note for note in found.notes)
    # Equal weights up to rounding reject no assumption.
    assert any("'cascade' is chosen and 'standard' is not" in note for note in found.notes)
    # The run serves one item, its log has five: that the value is of five is said.
    assert any("shows 1 item a round, and this log has" in n for n in found.notes)


def test_positions_count_by_their_weights(served) -> None:
    """Against the same rewards multiplied in the log, under every interaction and estimator."""
    run, log, reward = served
    alpha = [1.0, 0.5, 0.25, 0.0, 2.0]
    weights = f"evaluation.position_weights={alpha}"
    estimators = (
        "evaluation.estimators=[ips, snips, dr, {name: ips, interaction: standard}, "
        "{name: clipped_dr, max_weight: 2}]"
    )
    found = evaluate_runs([run], log=log, overrides=[weights, estimators])
    policy = next(iter(found.result.policies.values()))
    logged = (reward * alpha).sum(axis=1)
    # Propensities of the policy itself: every weight is 1.
    assert found.result.logging.estimate.value == pytest.approx(logged.mean(), rel=1e-7)
    for name in ("ips", "standard_ips"):
        estimate = policy.estimates[name].estimate
        assert estimate.value == pytest.approx(logged.mean(), rel=5e-5)
        assert estimate.std_error == pytest.approx(logged.std(ddof=1) / ROUNDS**0.5, rel=1e-3)
    plain = evaluate_runs([run], log=log, overrides=[estimators])
    before = next(iter(plain.result.policies.values())).estimates["dr"].estimate
    weighted = policy.estimates["dr"].estimate
    # A linear functional of each position: all weights 1 leave the value.
    assert abs(weighted.value - logged.mean()) < 4.0 * weighted.std_error
    assert weighted.value != pytest.approx(before.value, rel=1e-3)
    ones = evaluate_runs(
        [run], log=log, overrides=[f"evaluation.position_weights={[1.0] * K}", estimators]
    )
    assert next(iter(ones.result.policies.values())).estimates["dr"].estimate.value == before.value
    assert any("rewards count by position: 1, 0.5, 0.25, 0, 2" in note for note in found.notes)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("[1, 1]", "has position 4, and evaluation.position_weights has only 2 numbers"),
        ("[1, -1, 1, 1, 1]", "finite numbers of at least 0"),
        ("[0, 0, 0, 0, 0]", "not all 0"),
    ],
)
def test_wrong_position_weights_are_refused(served, weights, message) -> None:
    run, log, _ = served
    with pytest.raises(OfftowerError, match=message):
        evaluate_runs([run], log=log, overrides=[f"evaluation.position_weights={weights}"])


def test_parts_on_workers_give_the_same_bits(served) -> None:
    run, log, _ = served
    overrides = ["evaluation.batch_rows=256"]
    here = evaluate_runs([run], log=log, overrides=overrides).result.to_dict()
    there = evaluate_runs([run], log=log, overrides=overrides, execution=BACKWARDS)
    assert there.result.to_dict() == here


def test_estimators_of_both_interactions_and_their_selection(served) -> None:
    run, log, _ = served
    names = ["{name: ips, interaction: standard}", "ips", "snips"]
    found = evaluate_runs(
        [run],
        log=log,
        overrides=[
            f"evaluation.estimators=[{', '.join(names)}]",
            "evaluation.selection.models=[]",
        ],
        select="all",
    )
    policy = next(iter(found.result.policies.values()))
    assert set(policy.estimates) == {"standard_ips", "ips", "snips"}
    selection = next(iter(found.selection.values()))
    assert set(selection.results) == {"paired", "ocv", "slope"}
    assert "no form for slates" in selection.failed["pasif"]
    names = {score.name for score in selection.results["paired"].ranking}
    assert {"IPS", "IPS (standard)", "SNIPS (standard)"} <= names
    with pytest.raises(ConfigError, match="marginal probability"):
        evaluate_runs(
            [run],
            log=log,
            overrides=["evaluation.estimators=[{name: ips, interaction: independent}]"],
        )
    with pytest.raises(ConfigError, match="no form for slates"):
        evaluate_runs([run], log=log, select="pasif")


def test_pscores_of_whole_slates_permit_standard_only(served, tmp_path) -> None:
    run, log, reward = served
    table = pa.concat_tables(ParquetLog.open(log).tables())
    opened = ParquetLog.open(log)
    product = table.column("pscore").to_numpy().reshape(-1, K).prod(axis=1).repeat(K)
    at = table.column_names.index("pscore")
    schema = replace(opened.schema, pscore_kind="slate")
    write_log(tmp_path / "log", [table.set_column(at, "pscore", pa.array(product))], schema)
    found = evaluate_runs([run], log=tmp_path / "log")
    policy = next(iter(found.result.policies.values()))
    logged = reward.sum(axis=1).mean()
    assert set(policy.estimates) == {"ips", "snips"}
    assert policy.estimates["ips"].estimate.value == pytest.approx(logged, rel=2e-4)
    with pytest.raises(ConfigError, match="conditional probability"):
        evaluate_runs(
            [run],
            log=tmp_path / "log",
            overrides=["evaluation.estimators=[{name: ips, interaction: cascade}]"],
        )


@pytest.mark.parametrize("name", ["ips", "clipped_dr"])
def test_training_on_served_slates(served, name) -> None:
    run, log, reward = served
    arguments = {"max_weight": 20.0} if name == "clipped_dr" else {}
    config = parse_config(
        {
            "name": name,
            "runs": str(run.parent),
            "data": {
                "train": str(log),
                "validation": str(log),
                "catalogue": str(run.parent.parent / "catalogue"),
            },
            "policy": {
                "embedding_dim": 8,
                "context_tower": {"hidden_layer_sizes": [16]},
                "item_tower": {"hidden_layer_sizes": [16]},
            },
            "reward_model": {"kind": "factored", "epochs": 1, "folds": 2},
            "objective": {"name": name, "arguments": arguments},
            "training": {
                "epochs": 12,
                "batch_size": 500,
                "learning_rate": 0.02,
            },
        }
    )
    train_run(config)
    policy = next(iter(evaluate_runs([config.run_directory], log=log).result.policies.values()))
    # On its own training log the objective's value rises above the logged mean.
    assert policy.estimates["snips"].estimate.value > reward.sum(axis=1).mean()
    assert policy.estimates["snips"].estimate.n == ROUNDS


def test_auto_names_objectives_for_slates(served) -> None:
    run, log, _ = served
    data = {"train": str(log), "catalogue": str(run.parent.parent / "catalogue")}
    with pytest.raises(ConfigError, match="holds slates"):
        train_run(parse_config({"name": "auto", "runs": str(run.parent), "data": data}))
