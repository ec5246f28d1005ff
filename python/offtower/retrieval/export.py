"""A trained policy as a retrieval system: vectors, index, cells, context tower, manifest."""

from __future__ import annotations

import importlib.util
import shutil
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import offtower
from offtower.atomic import remove_leftovers, replace_directory, sha256_file
from offtower.checksums import describe_files
from offtower.config import Config
from offtower.data.lease import Lease
from offtower.data.location import AnyPath
from offtower.errors import ConfigError, DataError, MissingExtraError
from offtower.mapping import Mapper
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_policy
from offtower.prepare import catalogue_schema
from offtower.progress import Progress
from offtower.retrieval.catalogue_stream import CatalogueStream
from offtower.retrieval.exact import exact_top_k, recall
from offtower.retrieval.graphs import write_graphs
from offtower.retrieval.index import IndexOptions, import_faiss
from offtower.retrieval.index_building import build_index
from offtower.retrieval.manifest import (
    set_current,
    write_manifest,
)
from offtower.retrieval.measurement import measurement_log, sample_contexts
from offtower.retrieval.parquet_parts import Layout, metadata_texts, write_parquet
from offtower.retrieval.partitioning import build_cells
from offtower.retrieval.tower import ContextTower
from offtower.retrieval.vectors import (
    Dtype,
    load_ids,
    quantize,
    query_dim,
    write_vectors,
)
from offtower.run_directory import RunDirectory

SMALL_CATALOGUE = 20_000
"""Up to so many items an exact scan is as fast as an index, and "auto" builds none."""
_LOSS_CONTEXTS = 200


@dataclass(frozen=True)
class ExportOptions:
    """What an export holds.

    Attributes:
        dtype: of the item vectors; the recall that half precision or int8 lose is measured.
        index: None searches exactly. "auto" takes ivf_flat where FAISS is installed and the
            catalogue has more than 20,000 items.
        sampling: write the cells that draws with propensities need (float32, in addition).
        parquet: write Parquet parts.
        layout: "offtower" has columns item_id and embedding; "vector_db" id, values, metadata.
        fixed_size: lists of fixed size in the Parquet parts; plain lists otherwise.
        onnx: None writes ONNX where its packages are installed, True insists.
        contexts: how many contexts recall is measured and parameters are chosen on.
        num_cells: of the sampling; by the number of items where it is None.
        kept: versions kept, the new one included.
        chunk: items embedded at a time.
        seed: of the index, the cells and the choice of contexts.
    """

    dtype: Dtype = "float32"
    index: IndexOptions | str | None = "auto"
    sampling: bool = True
    parquet: bool = True
    layout: Layout = "offtower"
    fixed_size: bool = True
    onnx: bool | None = None
    contexts: int = 1000
    num_cells: int | None = None
    kept: int = 2
    chunk: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16", "int8"):
            raise ConfigError(f"dtype must be float32, float16 or int8, got '{self.dtype}'")
        if self.layout not in ("offtower", "vector_db"):
            raise ConfigError(f"layout must be offtower or vector_db, got '{self.layout}'")
        for name in ("contexts", "kept", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def export_run(
    run: str | Path,
    options: ExportOptions | None = None,
    *,
    catalogue: AnyPath | None = None,
    contexts: AnyPath | None = None,
    mapper: Mapper | None = None,
    progress: Progress | None = None,
    trust_code: Collection[str] = (),
) -> Path:
    """Export a run's policy to RUN/export/<version> and make it the current version.

    A version is written beside and renamed, and CURRENT is replaced last: whatever fails or is
    killed in between, the earlier version stays and is served.

    Args:
        run: run directory; only its config.yaml and policy/ are read.
        catalogue: items to export in place of those trained on; new ones are embedded from their
            features.
        contexts: log to measure recall on; the run's test, validation or training log without it.
        mapper: where items are embedded; the vectors are the same bits with any. Cells, index and
            Parquet parts are made in this process.
        trust_code: import paths of code that the run may name, as in `load_policy`.

    Returns:
        the version's folder.

    Raises:
        RunError: the run has no policy, or files cannot be written or read.
        LeaseError: another process exports this run.
        DataError: the catalogue is bad, or a vector is not finite.
        ConfigError: an option is out of range, or no parameters reach the target recall.
    """
    options, progress = options or ExportOptions(), progress or Progress()
    directory = RunDirectory(run)
    config = directory.load_config(trust_code=trust_code)
    policy, facts = load_policy(directory.policy, trust_code=trust_code)
    stream = CatalogueStream(catalogue or config.data.catalogue, catalogue_schema(config))
    export = directory.path / "export"
    export.mkdir(parents=True, exist_ok=True)
    with Lease.acquire(export) as lease:
        remove_leftovers(export)
        now = datetime.now(UTC)
        version = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        with replace_directory(export / version) as folder:
            writer = _Writer(
                folder, version, policy, stream, config, options, mapper or Mapper(), progress
            )
            content = writer.write(contexts)
            content |= {
                "created": now.isoformat(timespec="seconds"),
                "offtower": offtower.__version__,
                "run": directory.path.name,
                "policy": {
                    **facts,
                    "weights_sha256": sha256_file(directory.policy / "policy.safetensors"),
                },
            }
            write_manifest(folder, content)
        lease.check()
        set_current(export, version)
        _remove_old(export, version, options.kept)
    return export / version


class _Writer:
    """Writes the files of one version, and says what they are."""

    def __init__(
        self,
        folder: Path,
        version: str,
        policy: TwoTowerPolicy,
        catalogue: CatalogueStream,
        config: Config,
        options: ExportOptions,
        mapper: Mapper,
        progress: Progress,
    ) -> None:
        self.folder, self.version, self.policy = folder, version, policy
        self.catalogue, self.config, self.options = catalogue, config, options
        self.mapper, self.progress = mapper, progress

    def write(self, contexts: AnyPath | None) -> dict[str, Any]:
        """All files but the manifest; returns its content."""
        options, folder = self.options, self.folder
        seconds: dict[str, float] = {}
        began = time.perf_counter()

        def lap(what: str) -> None:
            nonlocal began
            seconds[what] = round(time.perf_counter() - began, 3)
            began = time.perf_counter()

        tower = ContextTower.of(self.policy)
        log, part = measurement_log(self.config, contexts)
        queries = tower.embed(sample_contexts(log, tower.encoding, options.contexts, options.seed))
        if not np.isfinite(queries).all():
            raise DataError("context embeddings are not finite: the policy's weights hold NaN")
        tower.save(folder / "context_tower", self.version)
        wants_onnx = options.onnx if options.onnx is not None else _has_onnx()
        graphs = write_graphs(tower, folder / "context_tower", self.version, onnx=wants_onnx)
        lap("context tower")
        streamed = write_vectors(
            self.policy,
            self.catalogue,
            folder,
            chunk=options.chunk,
            mapper=self.mapper,
            progress=self.progress,
        )
        exact = np.load(folder / "vectors.npy", mmap_mode="r")
        scale, loss, name = None, None, "vectors.npy"
        served: NDArray[Any] = exact
        if options.dtype != "float32":
            name = f"vectors_{options.dtype}.npy"
            scale = quantize(exact, options.dtype, folder, name)
            served = np.load(folder / name, mmap_mode="r")
            if scale is not None:
                np.save(folder / "scale.npy", scale)
            loss = _loss(queries, exact, served, scale)
        lap("vectors")
        cells = None
        if options.sampling:
            (folder / "cells").mkdir()
            made = build_cells(
                exact, queries, folder / "cells", num_cells=options.num_cells, seed=options.seed
            )
            made.save(folder / "cells")
            cells = made.statistics()
            del made
            lap("cells")
        index = self._index(served, queries, scale)
        lap("index")
        if options.parquet:
            ids = load_ids(folder / "ids.arrow", streamed.count)
            texts = metadata_texts(self.catalogue) if options.layout == "vector_db" else None
            write_parquet(
                served,
                ids,
                folder / "items",
                layout=options.layout,
                fixed_size=options.fixed_size,
                metadata=texts,
            )
            lap("parquet")
        if options.dtype != "float32":
            # Only the served precision is kept; cells hold float32 rows of their own.
            (folder / "vectors.npy").unlink()
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        return {
            "version": self.version,
            "vectors": {
                "file": name,
                "count": streamed.count,
                "dim": query_dim(self.policy),
                "embedding_dim": self.policy.config.embedding_dim,
                "bias": self.policy.config.item_bias,
                "dtype": options.dtype,
                "metric": "inner_product",
                "temperature": "folded into the context tower",
                "text_ids": streamed.text_ids,
                "precision": loss,
            },
            "catalogue": {
                "path": str(self.catalogue.path),
                "fingerprint": streamed.fingerprint,
                "ids_sha256": streamed.ids_sha256,
            },
            "log_schema": log.schema.to_dict(),
            "measured_on": {"part": part, "contexts": len(queries), "fingerprint": log.fingerprint},
            "context_tower": graphs,
            "cells": cells,
            "index": index,
            "parquet": {"layout": options.layout, "fixed_size": options.fixed_size}
            if options.parquet
            else None,
            "seconds": seconds,
            "files": describe_files(folder, files),
        }

    def _index(
        self, vectors: NDArray[Any], queries: NDArray[np.float32], scale: NDArray[np.float32] | None
    ) -> dict[str, Any] | None:
        wanted = self.options.index
        if wanted is None:
            return None
        if wanted == "auto":
            try:
                import_faiss()
            except MissingExtraError:
                return None
            if len(vectors) <= SMALL_CATALOGUE:
                return None
            wanted = IndexOptions()
        if not isinstance(wanted, IndexOptions):
            raise ConfigError(f"index must be IndexOptions, 'auto' or None, got {wanted!r}")
        place = self.folder / "index"
        return build_index(vectors, queries, place, wanted, self.version, scale)


def _loss(
    queries: NDArray[np.float32],
    exact: NDArray[np.float32],
    served: NDArray[Any],
    scale: NDArray[np.float32] | None,
) -> dict[str, Any]:
    """What the precision costs: share of the exact top k that it keeps, by k."""
    queries = queries[:_LOSS_CONTEXTS]
    found = {}
    for k in (10, 100):
        if k <= len(exact):
            truth = exact_top_k(queries, exact, k)[1]
            kept = recall(exact_top_k(queries, served, k, scale)[1], truth)
            found[f"recall@{k}"] = float(kept.mean())
    return {**found, "contexts": len(queries)}


def _has_onnx() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxscript"))


def _remove_old(export: Path, version: str, kept: int) -> None:
    """Keep the newest versions; names begin with their time."""
    versions = sorted(p for p in export.iterdir() if (p / "manifest.json").exists())
    for old in [p for p in versions if p.name != version][: max(0, len(versions) - kept)]:
        shutil.rmtree(old, ignore_errors=True)
