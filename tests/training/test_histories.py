"""Training, export and evaluation of policies whose contexts have histories."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from offtower.cli import app
from offtower.config import Config, parse_config, to_dict
from offtower.data import Catalogue, ParquetLog
from offtower.data.encoding import BagTensor, to_tensors
from offtower.data.reader import scan
from offtower.errors import DataError
from offtower.evaluation.run import evaluate_runs
from offtower.models.items import ItemFeatures
from offtower.models.store import load_policy
from offtower.retrieval import ExportOptions, IndexOptions, Retriever, export_run
from offtower.retrieval.graphs import graph_inputs, write_graphs
from offtower.retrieval.tower import ContextTower
from offtower.server.columns import ContextColumns
from offtower.server.errors import RequestError
from offtower.server.requests import RequestReader
from offtower.server.settings import Limits
from offtower.training.run import train_run
from offtower.training.trainer import Trainer
from offtower.training.workers import Workers
from tests.histories import add_histories
from tests.training.conftest import make_config
from tests.training.distributed.processes import run_workers
from tests.training.distributed.world import write_world
from tests.training.test_resume import assert_same_policy, weights

KINDS = {
    "mean": ["encoder=mean"],
    "attention": ["encoder=attention"],
    "transformer": ["encoder=transformer", "layers=1"],
    "pointwise": ["encoder=transformer", "attention=pointwise", "layers=1"],
}
SAMPLED = (
    "training.terms=sampled",
    "sampling.num_samples=8",
    "training.table_updates=lazy_adamw",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_world(tmp_path_factory.mktemp("seen"))
    add_histories(place, 999)
    return place


def config_of(folder: Path, runs: Path, name: str, kind: str, *more: str) -> Config:
    settings = [f"policy.context_tower.history.{one}" for one in KINDS[kind]]
    config = make_config(
        folder,
        runs,
        name,
        "training.epochs=2",
        "policy.item_bias=true",
        "policy.context_tower.history.dropout=0.1",
        "policy.context_tower.history.width=8",
        "reward_model.epochs=1",
        *settings,
        *more,
    )
    content = to_dict(config)
    for part in ("train", "validation", "test"):
        content["data"][part] += "_seen"
    return parse_config(content)


class Runs(dict[str, Config]):
    """Runs with exact terms for each encoder, and with sampled terms and sparse updates for one;
    each is trained once it is read."""

    def __init__(self, folder: Path, place: Path) -> None:
        super().__init__()
        self._folder, self._place = folder, place

    def __missing__(self, name: str) -> Config:
        sampled = name == "sampled"
        kind, more = ("transformer", SAMPLED) if sampled else (name, ())
        self[name] = config_of(self._folder, self._place, name, kind, *more)
        train_run(self[name])
        return self[name]


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(folder, tmp_path_factory.mktemp("runs"))


def log_probs(config: Config, folder: Path) -> np.ndarray:
    """(rows, items) of the test log's contexts."""
    policy, _ = load_policy(config.run_directory / "policy")
    catalogue = Catalogue.open(folder / "catalogue")
    rows = next(
        iter(scan(ParquetLog.open(folder / "test_seen"), catalogue, policy.context_encoding, 300))
    )
    with torch.no_grad():
        u = policy.embed_contexts(to_tensors(rows.context)).double()
        items = policy.embed_items(ItemFeatures.from_catalogue(catalogue, policy.item_encoding))
        assert items.bias is not None
        logit = u @ items.embedding.double().T / policy.temperature + items.bias
    return torch.log_softmax(logit, dim=1).numpy()


def test_policies_depend_on_the_history(runs: Runs, folder: Path) -> None:
    for name in (*KINDS, "sampled"):
        config = runs[name]
        policy, _ = load_policy(config.run_directory / "policy")
        assert len(policy.context_tower.shared_tables) == 1, name
        table = pq.read_table(folder / "test_seen")
        features = to_tensors(policy.context_encoding.encode(table))
        bag = features["seen"]
        assert isinstance(bag, BagTensor)
        others = {**features, "seen": replace(bag, values=bag.values.flip(0))}
        with torch.no_grad():
            change = policy.embed_contexts(features) - policy.embed_contexts(others)
        assert float(change.abs().max()) > 1e-3, name


@pytest.mark.parametrize("name", ["transformer", "sampled"])
def test_a_stopped_run_resumes_to_the_same_bits(
    runs: Runs, folder: Path, tmp_path: Path, name: str
) -> None:
    more = SAMPLED if name == "sampled" else ()
    config = config_of(folder, tmp_path, name, "transformer", *more)

    steps = 0
    update = Trainer.update

    def stopping(self: Trainer, *arguments: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 25:
            raise KeyboardInterrupt
        return update(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_run(config)
    assert steps == 25
    train_run(config, resume=True)
    assert_same_policy(config.run_directory, runs[name].run_directory)


def train(workers: Workers, config: Config) -> None:
    train_run(config, workers=workers)


@pytest.mark.parametrize("strategy", ["replicated", "item_sharded"])
@pytest.mark.parametrize("name", ["transformer", "sampled"])
def test_two_workers_train_the_policy_of_one(
    runs: Runs, folder: Path, tmp_path: Path, name: str, strategy: str
) -> None:
    more = SAMPLED if name == "sampled" else ()
    strategy = f"training.strategy={strategy}"
    config = config_of(folder, tmp_path, name, "transformer", strategy, *more)
    run_workers(2, train, config)
    found, truth = log_probs(config, folder), log_probs(runs[name], folder)
    assert np.abs(np.exp(truth) - 1 / 14).max() > 0.02
    np.testing.assert_allclose(found, truth, rtol=0, atol=2e-4)
    # The table itself, whose rows have gradients from both towers.
    (key,) = [key for key, value in weights(config.run_directory).items() if value.shape == (15, 3)]
    one, two = weights(runs[name].run_directory)[key], weights(config.run_directory)[key]
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "kind",
    [
        "mean",
        pytest.param("attention", marks=pytest.mark.slow),
        "transformer",
        pytest.param("pointwise", marks=pytest.mark.slow),
    ],
)
def test_exported_towers_score_histories_as_training_did(
    runs: Runs, folder: Path, tmp_path: Path, kind: str
) -> None:
    policy, _ = load_policy(runs[kind].run_directory / "policy")
    tower = ContextTower.of(policy)
    tower.save(tmp_path / "tower", "v")
    tower = ContextTower.load(tmp_path / "tower", "v")
    table = pq.read_table(folder / "test_seen")
    with torch.no_grad():
        truth = policy.embed_contexts(to_tensors(policy.context_encoding.encode(table))).numpy()
    np.testing.assert_allclose(tower.embed(table)[:, :-1], truth, rtol=1e-5, atol=1e-5)
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        onnxruntime = None
    facts = write_graphs(tower, tmp_path, "v", onnx=onnxruntime is not None)
    assert facts["reason"] is None
    program = torch.export.load(tmp_path / "context_tower.pt2").module()
    for rows in (1, 7, 300):
        inputs = graph_inputs(tower.encoding, table.slice(0, rows))
        found = program(*(torch.from_numpy(value) for value in inputs.values())).detach().numpy()
        np.testing.assert_allclose(found[:, :-1], truth[:rows], rtol=1e-5, atol=1e-5)
        if onnxruntime is not None:
            session = onnxruntime.InferenceSession(
                str(tmp_path / "context_tower.onnx"), providers=["CPUExecutionProvider"]
            )
            onnx = session.run(["query"], inputs)[0]
            np.testing.assert_allclose(onnx[:, :-1], truth[:rows], rtol=1e-5, atol=1e-5)
    contract = json.loads((tmp_path / "contract.json").read_text())
    assert [entry["input"] for entry in contract["inputs"]] == list(inputs)


@pytest.mark.usefixtures("no_graphs")
def test_search_and_evaluation_read_histories(runs: Runs, folder: Path) -> None:
    config = runs["transformer"]
    export_run(config.run_directory, ExportOptions(index=IndexOptions(kind="flat")))
    retriever = Retriever.open(config.run_directory)
    table = pq.read_table(folder / "test_seen")
    found = retriever.search(table, 3, exact=True)
    order = np.argsort(-log_probs(config, folder), axis=1)[:, :3]
    ids = pq.read_table(folder / "catalogue").column("item_id").to_numpy()
    np.testing.assert_array_equal(np.asarray(found.item_id), ids[order])
    with pytest.raises(DataError, match="no column 'timestamp'"):
        retriever.search(table.drop_columns(["timestamp"]), 3)
    # As the server reads them from JSON: whole numbers become text.
    names = retriever.tower.encoding.columns
    given = pa.RecordBatch.from_pylist(table.slice(0, 20).select(names).to_pylist())
    served = ContextColumns.of(retriever).table(given)
    np.testing.assert_allclose(retriever.embed(served), retriever.embed(table.slice(0, 20)))
    # Events at the time of the request or later are dropped, with all that is known of them.
    reader = RequestReader(retriever, ContextColumns.of(retriever), Limits(), True)
    rows = table.slice(0, 3).select(names).to_pylist()
    history = {"seen": [3, 1, 2], "seen_as": ["buy", "click", "buy"], "seen_for": [1.0, 2.0, 3.0]}
    now = rows[1]["timestamp"]
    rows[1] |= {**history, "seen_at": [now - 9, now + 5, now]}
    early = {
        **rows[1],
        **{name: value[:1] for name, value in history.items()},
        "seen_at": [now - 9],
    }
    asked = reader.json("search", json.dumps({"contexts": rows}).encode(), {})
    wanted = reader.json("search", json.dumps({"contexts": [rows[0], early, rows[2]]}).encode(), {})
    assert (asked.late_events, wanted.late_events) == (2, 0)
    assert asked.contexts.to_pylist()[1] == wanted.contexts.to_pylist()[1]
    np.testing.assert_array_equal(retriever.embed(asked.contexts), retriever.embed(wanted.contexts))
    for wrong, field in (
        ({"seen_at": [now - 9, None, now - 2]}, "contexts[1].seen_at"),
        ({"seen_for": [1.0, None, 2.0], "seen_at": [1, 2, 3]}, "contexts[1].seen_for"),
        ({"seen_at": [now - 9]}, "contexts"),
        ({"timestamp": None}, "contexts[1].timestamp"),
    ):
        content = json.dumps({"contexts": [rows[0], {**rows[1], **wrong}]}).encode()
        with pytest.raises(RequestError) as refused:
            reader.json("search", content, {})
        assert refused.value.field == field
    asking = ["search", str(config.run_directory), "--contexts", json.dumps(rows), "--json"]
    result = CliRunner().invoke(app, asking)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rounds"]["late_events"] == 2
    assert "2 events of histories" in result.stderr
    evaluation = evaluate_runs([config.run_directory])
    assert evaluation.log["rows"] == 300
    # Rows with an event of an item that the catalogue does not have.
    assert "seen" in evaluation.unknown_values["transformer"]
