"""Texts describe items that the log never showed; exports read texts as training did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from offtower.config import parse_config
from offtower.data import CatalogueSchema, FeatureSpec, LogSchema, write_catalogue, write_log
from offtower.data.catalogue import Catalogue
from offtower.data.encoding import to_tensors
from offtower.evaluation.run_loading import open_run
from offtower.retrieval import ExportOptions, Retriever, export_run
from offtower.retrieval.graphs import graph_inputs
from offtower.run_directory import RunDirectory
from offtower.server import ServerSettings
from offtower.training.run import train_run
from tests.retrieval.serving import serving

TOPICS = ("garden", "kitchen", "travel", "music", "sport")
ENDINGS = ("", "s", "er", "ing", " guide", " tips")
ITEMS, SHOWN, ROWS = 200, 100, 4000


class World:
    """Items with titles about a topic, of which the first half is shown at random; a reward has
    probability 0.8 where the topic is the one that the context asks for, else 0.1."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.topic = rng.integers(0, len(TOPICS), ITEMS)
        endings = rng.integers(0, len(ENDINGS), ITEMS)
        filler = rng.integers(0, 50, ITEMS)
        self.title = [
            f"{TOPICS[t]}{ENDINGS[e]} no{f}"
            for t, e, f in zip(self.topic, endings, filler, strict=True)
        ]
        asked = rng.integers(0, len(TOPICS), ROWS)
        item = rng.integers(0, SHOWN, ROWS)
        chance = np.where(self.topic[item] == asked, 0.8, 0.1)
        self.log = pa.table(
            {
                "query": [f"{TOPICS[one].upper()} please" for one in asked],
                "action": item,
                "reward": (rng.random(ROWS) < chance).astype(float),
                "pscore": np.full(ROWS, 1.0 / SHOWN),
            }
        )
        self.catalogue = pa.table({"item_id": np.arange(ITEMS), "title": self.title})

    def train(self, folder: Path, item: FeatureSpec, **tower: Any) -> Path:
        name = item.name if not tower else "attention"
        schema = CatalogueSchema(features=(item,))
        write_catalogue(folder / name / "catalogue", self.catalogue, schema)
        context = (FeatureSpec("query", "text", buckets=4096),)
        write_log(folder / name / "log", [self.log], LogSchema(context))
        config = parse_config(
            {
                "name": "run",
                "runs": str(folder / name),
                "data": {
                    "train": str(folder / name / "log"),
                    "catalogue": str(folder / name / "catalogue"),
                },
                "policy": {
                    "embedding_dim": 8,
                    "context_tower": {"hidden_layer_sizes": [16]},
                    "item_tower": tower or {"hidden_layer_sizes": [16]},
                },
                "objective": {"name": "weighted_likelihood"},
                "training": {"epochs": 4, "learning_rate": 0.02, "batch_size": 256, "threads": 1},
            }
        )
        train_run(config)
        return config.run_directory

    def cold_value(self, path: Path) -> float:
        """Expected reward of the policy among the items that were never shown; 0.24 at random."""
        config = RunDirectory(path).load_config()
        run = open_run(path, Catalogue.open(config.data.catalogue))
        queries = pa.table({"query": [f"{topic} please" for topic in TOPICS]})
        features = to_tensors(run.policy.context_encoding.encode(queries))
        with torch.no_grad():
            context = run.policy.embed_contexts(features)
            items = run.policy.embed_items(run.items)
            cold = (context @ items.embedding[SHOWN:].T) / run.policy.temperature
            share = torch.softmax(cold, dim=1).numpy()
        right = self.topic[None, SHOWN:] == np.arange(len(TOPICS))[:, None]
        return float((share * np.where(right, 0.8, 0.1)).sum(axis=1).mean())


def test_titles_describe_items_that_were_never_shown(tmp_path: Path) -> None:
    """Values are exact sums over the items, so only the training log and the start are random.

    Scores by ids say nothing of items without rows: the value is then 0.24 with a deviation below
    0.03 where 100 pairs of contexts and items share the draws, so that a gap of 0.1 is beyond three
    of them (error below 0.002).
    """
    world = World(0)
    ids = FeatureSpec("item_id", "category")
    words = FeatureSpec("title", "text", tokens="words", buckets=1024)
    by_id = world.cold_value(world.train(tmp_path, ids))
    by_title = world.cold_value(world.train(tmp_path, FeatureSpec("title", "text", buckets=4096)))
    by_attention = world.cold_value(
        world.train(
            tmp_path,
            words,
            module="offtower.models.token_attention:TokenAttentionTower",
            arguments={"text": "title", "width": 16},
        )
    )
    assert by_title > by_id + 0.1, (by_id, by_title)
    # Words of their own, without the subwords that garden and gardening share.
    assert by_attention > by_id + 0.1, (by_id, by_attention)


def test_exports_read_texts_as_training_did(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("uvicorn")
    onnx = pytest.importorskip("onnxruntime")
    path = World(1).train(tmp_path, FeatureSpec("title", "text", buckets=4096))
    export = export_run(path, ExportOptions())
    retriever = Retriever.open(path)
    texts = ["GARDEN please", None, "", "ﬁne  Straße", "sports " * 200]
    contexts = pa.table({"query": pa.array(texts, pa.string())})
    run = open_run(path, Catalogue.open(RunDirectory(path).load_config().data.catalogue))
    encoded = run.policy.context_encoding.encode(contexts)["query"]
    served = retriever.tower.encoding.encode(contexts)["query"]
    assert not isinstance(encoded, np.ndarray) and not isinstance(served, np.ndarray)
    assert np.array_equal(encoded.values, served.values)
    assert np.array_equal(encoded.offsets, served.offsets)
    query = retriever.tower.embed(contexts)
    assert np.isfinite(query).all() and np.array_equal(query[1], query[2])
    session = onnx.InferenceSession(next(export.rglob("*.onnx")))
    (found,) = session.run(None, graph_inputs(retriever.tower.encoding, contexts))
    np.testing.assert_allclose(found, query, atol=1e-5)
    best = retriever.search(contexts, 5)
    assert all(len(one) == 5 for one in best.item_id)
    asked = {"contexts": [{"query": text} for text in texts], "k": 5}
    with serving(ServerSettings(path)) as client:
        status, answer = client.json("/search", asked)
        assert status == 200, answer
        assert [one["items"] for one in answer["contexts"]] == best.item_id
        status, answer = client.json("/search", {"contexts": [{"query": ["a", "b"]}], "k": 5})
        assert status == 422 and "query" in str(answer)
