"""A log that the served policy made, evaluated with that policy: every weight is 1."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from offtower.config import ServingConfig
from offtower.config.evaluation import EstimatorConfig
from offtower.data import write_log
from offtower.data.catalogue import Catalogue
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.simulate import SimulatedWorld
from offtower.evaluation.evaluator import Evaluator
from offtower.evaluation.run_loading import OpenRun, open_run
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.prepare import catalogue_schema
from offtower.progress import Progress
from offtower.retrieval import Retriever, decisions_table, served_schema
from offtower.run_directory import RunDirectory

ROWS = 300
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"uniform": 0.1},
    {"temperature": 4.0, "uniform": 0.5},
    {"top": 20},
    {"top": 20, "uniform": 0.05, "temperature": 2.0},
    {"top": 1, "uniform": 0.3},
    {"uniform": 1.0},
]


@pytest.fixture(scope="module")
def opened(run: Path) -> tuple[OpenRun, Catalogue, PolicyScorer]:
    config = RunDirectory(run).load_config()
    catalogue = Catalogue.open(config.data.catalogue, catalogue_schema(config))
    loaded = open_run(run, catalogue)
    return loaded, catalogue, PolicyScorer(loaded.policy, loaded.items)


@pytest.mark.parametrize("mode", ["exact", "softmax"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_weights_are_one(
    setting: dict[str, Any],
    mode: str,
    exported: Path,
    opened: tuple[OpenRun, Catalogue, PolicyScorer],
    world: SimulatedWorld,
    tmp_path: Path,
) -> None:
    serving = ServingConfig(**setting)
    retriever = Retriever.open(exported, serving=serving)
    contexts = world.contexts(ROWS, seed=8)
    served = retriever.sample(contexts, mode=mode, seed=1, relative_error=0.01)  # type: ignore[arg-type]
    weight = weights(retriever, contexts, served, opened, serving, tmp_path)
    stated = served.relative_error[:, 0]
    if mode == "exact" or "top" in setting:
        assert not stated.any()
    # Estimated propensities differ by their stated error: 5 of them, 6e-7 a row if normal.
    assert (np.abs(weight - 1.0) <= 1e-5 + 5.0 * stated).all()
    other = ServingConfig(temperature=1.5)
    assert np.abs(weights(retriever, contexts, served, opened, other, tmp_path) - 1).max() > 0.01


def test_top_k_is_evaluated_as_it_is_served(
    exported: Path,
    opened: tuple[OpenRun, Catalogue, PolicyScorer],
    world: SimulatedWorld,
    tmp_path: Path,
) -> None:
    serving = ServingConfig(mode="top_k", k=3)
    retriever = Retriever.open(exported, serving=serving)
    contexts = world.contexts(ROWS, seed=8)
    served = retriever.sample(contexts, mode="exact")
    assert served.item.shape == (ROWS, 3) and (served.pscore == 1.0).all()
    best = retriever.search(contexts, 3, exact=True)
    assert np.array_equal(served.item, np.stack(best.item))
    weight = weights(retriever, contexts, served, opened, serving, tmp_path)
    assert (weight == 1.0).all()
    # Another position of the same items, and a policy that draws.
    turned = ServingConfig(mode="top_k", k=2)
    weight = weights(retriever, contexts, served, opened, turned, tmp_path)
    assert np.array_equal(weight.reshape(ROWS, 3), np.tile([1.0, 1.0, 0.0], (ROWS, 1)))


@pytest.mark.parametrize("k", [1, 3])
def test_what_an_index_found_is_what_the_policy_shows(
    k: int,
    exported: Path,
    opened: tuple[OpenRun, Catalogue, PolicyScorer],
    world: SimulatedWorld,
    tmp_path: Path,
) -> None:
    """An index that misses best items: the log names the export, whose answers count as shown."""
    serving = ServingConfig(mode="top_k", k=k)
    retriever = Retriever.open(exported, serving=serving)
    assert retriever.index is not None
    retriever.index.parameters = {"nprobe": 1}
    contexts = world.contexts(ROWS, seed=8)
    served = retriever.sample(contexts)
    missed = served.item != retriever.sample(contexts, mode="exact").item
    assert 0.01 < missed.mean() < 0.9
    exact = weights(retriever, contexts, served, opened, serving, tmp_path)
    # Cascade weights: 0 from the first other item on.
    assert np.array_equal(exact.reshape(ROWS, k) == 0.0, np.logical_or.accumulate(missed, axis=1))

    loaded, catalogue, _ = opened
    evaluation = replace(loaded.config.evaluation, estimators=[EstimatorConfig("ips")])
    config = replace(loaded.config, serving=serving, evaluation=evaluation)
    log = ParquetLog.open(tmp_path / "log")
    evaluator = Evaluator((replace(loaded, config=config),), log, catalogue, config)
    scorer = evaluator.plan(None, Progress()).scorer
    found = [batch.rows["small"] for batch in scorer.batches(range(scorer.source.num_batches))]
    assert all((rows.importance_weight == 1.0).all() for rows in found)
    # A log of another policy says nothing about this index.
    other = log.schema.behavior_policy
    assert other is not None
    table = pa.concat_tables(log.tables())
    index = table.column_names.index(other)
    table = table.set_column(index, other, pa.repeat("another", table.num_rows))
    write_log(tmp_path / "other", [table], log.schema)
    evaluator = replace(evaluator, log=ParquetLog.open(tmp_path / "other"))
    scorer = evaluator.plan(None, Progress()).scorer
    found = [batch.rows["small"] for batch in scorer.batches(range(scorer.source.num_batches))]
    assert np.array_equal(np.concatenate([rows.importance_weight for rows in found]), exact)


def weights(
    retriever: Retriever,
    contexts: pa.Table,
    served: Any,
    opened: tuple[OpenRun, Catalogue, PolicyScorer],
    serving: ServingConfig,
    folder: Path,
) -> np.ndarray:
    """(n,) importance weights of the served decisions."""
    loaded, catalogue, scorer = opened
    users = pa.array(np.arange(contexts.num_rows))
    log = decisions_table(retriever, contexts.append_column("user_id", users), served)
    log = log.append_column("reward", pa.array(np.zeros(log.num_rows)))
    shutil.rmtree(folder / "log", ignore_errors=True)
    write_log(folder / "log", [log], served_schema(retriever))
    batches = scan(ParquetLog.open(folder / "log"), catalogue, loaded.policy.context_encoding, 4096)
    scored = [scorer.served_as(serving).score(batch).importance_weight for batch in batches]
    return np.concatenate(scored)
