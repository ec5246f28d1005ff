"""A small log, catalogue, runs and export, and the verbs that read them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from offtower.config import Config, parse_config
from offtower.data import (
    Catalogue,
    FeatureEncoding,
    ParquetLog,
    node_cache,
    validate_log,
    write_catalogue,
    write_log,
)
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.evaluation.run import evaluate_runs
from offtower.jsonable import finite
from offtower.models import ItemFeatures
from offtower.retrieval import ExportOptions, IndexOptions, Retriever, export_run
from offtower.retrieval.catalogue_stream import CatalogueStream
from offtower.run_directory import RunDirectory
from offtower.training.run import train_run

WORLD = SimulatedWorld(
    12, WorldSettings(4, 4, 4, feature_kinds="all", intercept=0.0, string_ids=True), seed=1
)
FACTORED = {
    "kind": "factored",
    "embedding_dim": 4,
    "tower": {"hidden_layer_sizes": [8]},
    "folds": 2,
    "epochs": 1,
    "batch_size": 64,
}
DENSE = {"kind": "dense", "folds": 2}
AUTO = {"epochs": 1, "batch_size": 64, "folds": 2, "candidates": ["regression", "likelihood"]}


@dataclass(frozen=True)
class Subject:
    """Files of one kind, and what reads them.

    Attributes:
        name: of the kind.
        files: patterns below the world's folder.
        read: returns all that the verb computes from them, comparable by `==`.
        writes: the folder that `read` changes, put back afterwards; None where it changes nothing.
    """

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    writes: str | None = None

    def paths(self, root: Path) -> list[Path]:
        """The files that are there, in order."""
        found = {path for pattern in self.files for path in root.glob(pattern)}
        return sorted(path for path in found if path.is_file())

    @contextmanager
    def restored(self, root: Path) -> Iterator[None]:
        """Put back what `read` changes."""
        if self.writes is None:
            yield
            return
        folder, kept = root / self.writes, root / ".kept"
        shutil.copytree(folder, kept)
        try:
            yield
        finally:
            shutil.rmtree(folder)
            kept.rename(folder)


def config(root: Path, name: str, **sections: Any) -> Config:
    content = {
        "name": name,
        "runs": str(root / "runs"),
        "seed": 3,
        "data": {part: str(root / part) for part in ("train", "validation", "test", "catalogue")},
        "policy": {
            "embedding_dim": 4,
            "context_tower": {"hidden_layer_sizes": [8]},
            "item_tower": {"hidden_layer_sizes": [8]},
        },
        "reward_model": FACTORED,
        "objective": {"name": "dr"},
        "training": {
            "epochs": 2,
            "batch_size": 100,
            "log_every_steps": 1,
            "checkpoint_every_seconds": 0.0,
            "threads": 1,
        },
        **sections,
    }
    return parse_config(content)


def configs(root: Path) -> dict[str, Config]:
    """The runs, by name."""
    return {
        "factored": config(root, "factored"),
        "dense": config(root, "dense", reward_model=DENSE),
        "auto": config(root, "auto", objective={"name": "auto"}, auto=AUTO),
    }


def build(root: Path, *, full: bool = True) -> None:
    """Write the world below a folder, with all runs and ONNX where `full`.

    The resumed runs are left before their last step.
    """
    runs_of = {name: one for name, one in configs(root).items() if full or name == "factored"}
    write_catalogue(root / "catalogue", WORLD.catalogue_table(), WORLD.catalogue_schema)
    for seed, (part, rows) in enumerate({"train": 300, "validation": 100, "test": 200}.items()):
        sizes = {"rows_per_group": 50, "rows_per_file": 100}
        write_log(root / part, WORLD.log(rows, seed=seed), WORLD.log_schema, **sizes)
    for one in runs_of.values():
        train_run(one)
    runs = root / "runs"
    options = ExportOptions(index=IndexOptions(kind="flat"), contexts=20, onnx=full)
    export_run(runs / "factored", options)
    read_items(root)
    for name in runs_of:
        resumed = runs / f"{name}-resumed"
        shutil.copytree(runs / name, resumed, ignore=shutil.ignore_patterns("export"))
        shutil.rmtree(resumed / "policy")
        shutil.rmtree(resumed / "auto" / "refit", ignore_errors=True)
        for newest in sorted((resumed / "checkpoints").glob("step_*"))[-1:]:
            shutil.rmtree(newest)


def read_log(root: Path) -> Any:
    log = ParquetLog.open(root / "test")
    report = validate_log(log, Catalogue.open(root / "catalogue"))
    return report.to_dict(), log.fingerprint, _digest(log.tables())


def read_catalogue(root: Path) -> Any:
    catalogue = Catalogue.open(root / "catalogue")
    stream = CatalogueStream(root / "catalogue")
    chunks = [chunk.table(0, chunk.num_items) for chunk in stream.chunks()]
    whole = catalogue.table(0, catalogue.num_items)
    return catalogue.fingerprint, stream.fingerprint, _digest([whole]), _digest(chunks)


def read_items(root: Path) -> Any:
    """What a run reads of a catalogue that is too large for memory."""
    catalogue = Catalogue.open(root / "catalogue")
    encoding = FeatureEncoding.load(root / "runs" / "factored" / "encodings" / "item")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(node_cache.FOLDER, str(root / "items"))
        items = ItemFeatures.from_catalogue(catalogue, encoding, chunk=5, share_above=0)
    found = items.at(torch.arange(catalogue.num_items))
    return {name: repr(value) for name, value in found.items()}


def evaluate(root: Path) -> Any:
    """`offtower evaluate`, with estimators that need the reward model, and its curves."""
    found = evaluate_runs([root / "runs" / "factored"])
    return json.dumps(finite([found.to_dict(), found.curves, found.histograms]), sort_keys=True)


def resume(name: str) -> Callable[[Path], Any]:
    """`offtower train --resume`."""

    def read(root: Path) -> Any:
        runs = root / "runs"
        place = RunDirectory(runs / f"{name}-resumed")
        kept = runs / ".kept-run"
        (runs / name).rename(kept)
        place.path.rename(runs / name)
        try:
            result = train_run(configs(root)[name], resume=True)
            weights = (runs / name / "policy" / "policy.safetensors").read_bytes()
            history = [
                {k: v for k, v in line.items() if "second" not in k and "waiting" not in k}
                for line in result.history
            ]
            return hashlib.sha256(weights).hexdigest(), result.selected_step, finite(history)
        finally:
            (runs / name).rename(place.path)
            kept.rename(runs / name)

    return read


def search(root: Path) -> Any:
    """`offtower search`."""
    contexts = next(iter(ParquetLog.open(root / "test").tables())).slice(0, 10)
    found = Retriever.open(root / "runs" / "factored").search(contexts, 5)
    return found.item_id, np.asarray(found.score).tobytes()


def subjects() -> list[Subject]:
    """Every kind of file that offtower writes and reads again."""
    run = "runs/factored"
    version = f"{run}/export/[!.]*"

    def resumed(kind: str, name: str, *files: str) -> Subject:
        folder = f"runs/{name}-resumed"
        patterns = tuple(f"{folder}/{file}" for file in files)
        return Subject(kind, patterns, resume(name), writes=folder)

    return [
        Subject("log: Parquet", ("test/*.parquet",), read_log),
        Subject("log: manifest", ("test/_offtower.json",), read_log),
        Subject("catalogue: Parquet", ("catalogue/*.parquet",), read_catalogue),
        Subject("catalogue: manifest", ("catalogue/_offtower.json",), read_catalogue),
        Subject("run: config.yaml", (f"{run}/config.yaml",), evaluate),
        Subject("run: manifest.json", (f"{run}/manifest.json",), evaluate),
        Subject("run: metrics.jsonl", (f"{run}/metrics.jsonl",), evaluate),
        Subject("policy: weights", (f"{run}/policy/policy.safetensors",), evaluate),
        Subject("policy: JSON", (f"{run}/policy/**/*.json",), evaluate),
        Subject("policy: vocabularies", (f"{run}/policy/*/*.parquet",), evaluate),
        Subject("reward model, evaluated", (f"{run}/reward_model/*",), evaluate),
        resumed("reward model, resumed", "factored", "reward_model/*"),
        resumed("reward model, dense", "dense", "reward_model/*"),
        resumed("encodings", "factored", "encodings/*", "encodings/*/*"),
        Subject("encoded items", ("items/*/*",), read_items),
        resumed("checkpoints: tensors", "factored", "checkpoints/*/*.safetensors"),
        resumed("checkpoints: state.json", "factored", "checkpoints/*/state.json"),
        resumed("resumed: config.yaml, metrics", "factored", "config.yaml", "metrics.jsonl"),
        resumed("auto: members", "auto", "auto/**/*"),
        Subject("export: CURRENT", (f"{run}/export/CURRENT",), search),
        Subject("export: manifest", (f"{version}/*.json",), search),
        Subject("export: vectors and ids", (f"{version}/*.npy", f"{version}/*.arrow"), search),
        Subject("export: index and cells", (f"{version}/index/*", f"{version}/cells/*"), search),
        Subject("export: context tower", (f"{version}/context_tower/**/*",), search),
    ]


def _digest(tables: Any) -> str:
    digest = hashlib.sha256()
    for table in tables:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()
