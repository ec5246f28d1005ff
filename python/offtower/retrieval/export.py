"""Export a trained policy: item vectors, index, cells, context tower and manifest."""

from __future__ import annotations

import errno
import importlib.util
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import offtower
from offtower.atomic import remove_leftovers, replace_directory, sha256_file
from offtower.checksums import describe_files
from offtower.config import Config
from offtower.data.array_files import map_array
from offtower.data.lease import Lease
from offtower.data.location import AnyPath
from offtower.errors import ConfigError, DataError, MissingExtraError, OfftowerError, RunError
from offtower.execution import LOCAL, Execution
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_policy
from offtower.prepare import catalogue_schema
from offtower.retrieval.catalogue_stream import CatalogueStream
from offtower.retrieval.eligible import write_eligible
from offtower.retrieval.exact import exact_top_k, recall
from offtower.retrieval.export_options import ExportOptions
from offtower.retrieval.graphs import write_graphs
from offtower.retrieval.index import IndexOptions, import_faiss
from offtower.retrieval.index_building import build_index
from offtower.retrieval.index_update import EarlierIndex, update_index
from offtower.retrieval.manifest import (
    earlier_version,
    prune_versions,
    set_current,
    write_manifest,
)
from offtower.retrieval.measurement import measurement_log, sample_contexts
from offtower.retrieval.new_items import write_new_items
from offtower.retrieval.parquet_parts import ParquetSource, write_parquet
from offtower.retrieval.partitioning import build_cells
from offtower.retrieval.tower import ContextTower
from offtower.retrieval.vector_source import VectorSource
from offtower.retrieval.vectors import quantize, query_dim, write_vectors
from offtower.run_directory import RunDirectory

SMALL_CATALOGUE = 20_000
"""Catalogues up to this size get no index from "auto": an exact scan is as fast."""
_PRECISION_CONTEXTS = 200
"""Contexts that the recall of a reduced precision is measured on."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEAST_FREE_BYTES = 1 << 20
"""A write that fails with less free space counts as one to a full disk."""


def export_run(
    run: str | Path,
    options: ExportOptions | None = None,
    *,
    catalogue: AnyPath | None = None,
    contexts: AnyPath | None = None,
    execution: Execution = LOCAL,
    trust_code: Collection[str] = (),
) -> Path:
    """Export a run's policy to RUN/export/<version> and make it the current version.

    If the export fails or is killed, the earlier version stays in place and current.

    Args:
        run: run directory; only its config.yaml, manifest.json and policy/ are read.
        catalogue: items to export; those of the training catalogue by default. New items are
            embedded from their features.
        contexts: log to measure recall on; the run's test, validation or training log by default.
        execution: embeds the items, writes Parquet parts, assigns items to cells and lists and
            fills shards of the index, with the same result for any number of workers. Lists without
            shards are filled, and graphs built, in this process.
        trust_code: import paths of code that the run may name, as in `load_policy`.

    Returns:
        The version's folder.

    Raises:
        RunError: the run has no policy or is put together from several runs, files cannot be read
            or written, or the disk is full.
        LeaseError: another process exports this run.
        DataError: the catalogue is bad, or a vector is not finite.
        ConfigError: an option is out of range, or no parameters reach the target recall.
    """
    options = options or ExportOptions()
    directory = RunDirectory(run)
    config = directory.load_config(trust_code=trust_code)
    policy, facts = load_policy(directory.policy, trust_code=trust_code)
    directory.check_policy(config, facts)
    stream = CatalogueStream(catalogue or config.data.catalogue, catalogue_schema(config))
    export = directory.path / "export"
    export.mkdir(parents=True, exist_ok=True)
    of_run = directory.manifest()
    lineage = [Path(one["run"]) for one in of_run.get("descends_from", ())]
    earlier = earlier_version([directory.path, *lineage])
    with Lease.acquire(export) as lease:
        remove_leftovers(export)
        now = datetime.now(UTC)
        version = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        with (
            _full_disk_reported(export),
            replace_directory(export / version) as folder,
            # Once more inside: a failed write is removed, which frees its space.
            _full_disk_reported(export),
        ):
            writer = _Writer(
                folder,
                policy,
                stream,
                config,
                options,
                execution,
                restricted=of_run.get("eligible") is not None,
                earlier=earlier,
            )
            content = {
                "version": version,
                "created": now.isoformat(timespec="seconds"),
                "offtower": offtower.__version__,
                "run": directory.path.name,
                "descends_from": list(of_run.get("descends_from", ())),
                "earlier_export": None if earlier is None else earlier.name,
                "serving": asdict(config.serving),
                "policy": {
                    **facts,
                    "weights_sha256": sha256_file(directory.policy / "policy.safetensors"),
                },
                **writer.write(version, contexts),
            }
            write_manifest(folder, content)
        lease.check()
        set_current(export, version)
        prune_versions(export, kept=options.kept, keep_seconds=options.keep_seconds)
    return export / version


@contextmanager
def _full_disk_reported(export: Path) -> Iterator[None]:
    """Turn errors of a full disk into one message.

    Raises:
        RunError: the disk is full.
    """
    try:
        yield
    except OfftowerError:
        raise
    except Exception as error:
        # Some libraries raise RuntimeError without the system's error number.
        number = error.errno if isinstance(error, OSError) else None
        if number not in _FULL and shutil.disk_usage(export).free > _LEAST_FREE_BYTES:
            raise
        raise RunError(
            f"the disk is full: the export could not be written to '{export}' ({error}). Free "
            "some space and export again; the previous export is unchanged"
        ) from error


@dataclass(frozen=True)
class _Writer:
    """Writes the files of one version."""

    folder: Path
    policy: TwoTowerPolicy
    catalogue: CatalogueStream
    config: Config
    options: ExportOptions
    execution: Execution
    restricted: bool = False
    """Whether the policy was trained over eligible items."""
    earlier: Path | None = None
    """An earlier export of this policy, or of the one that it descends from."""

    def write(self, version: str, contexts: AnyPath | None) -> dict[str, Any]:
        """Write all files but the manifest, and return its content."""
        options, folder = self.options, self.folder
        clock = _Clock()
        tower = ContextTower.of(self.policy)
        log, part = measurement_log(self.config, contexts)
        if self.restricted and log.schema.eligible is None:
            raise ConfigError(
                "the policy was trained over eligible items, but the schema of the log with "
                "contexts has no section 'eligible', so the export would serve every item: give "
                "--contexts with a log that has it, or name it in data.log_schema"
            )
        queries = tower.embed(sample_contexts(log, tower.encoding, options.contexts, options.seed))
        if not np.isfinite(queries).all():
            raise DataError("context embeddings are not finite: the policy's weights hold NaN")
        tower.save(folder / "context_tower", version)
        wants_onnx = options.onnx if options.onnx is not None else _has_onnx()
        graphs = write_graphs(tower, folder / "context_tower", version, onnx=wants_onnx)
        clock.lap("context tower")
        written = write_vectors(
            self.policy,
            self.catalogue,
            folder,
            chunk=options.chunk,
            execution=self.execution,
        )
        write_eligible(
            self.catalogue.keeping(log.schema.eligible), log.schema, folder, chunk=options.chunk
        )
        if self.config.serving.new_items is not None:
            write_new_items(
                self.config.serving.new_items, self.policy, self.catalogue, folder, options.chunk
            )
        exact = map_array([folder / name for name in written.files])
        vector_files, scale, precision = written.files, None, None
        served: NDArray[Any] = exact
        if options.dtype != "float32":
            name = f"vectors_{options.dtype}"
            vector_files, scale = quantize(
                [folder / file for file in written.files],
                *(options.dtype, folder, name, self.execution.mapper),
            )
            served = map_array([folder / name for name in vector_files])
            if scale is not None:
                np.save(folder / "scale.npy", scale)
            precision = _precision(queries, exact, served, scale)
        whole = tuple((folder / name).resolve() for name in vector_files)
        clock.lap("vectors")
        cells = None
        if options.sampling:
            (folder / "cells").mkdir()
            made = build_cells(
                tuple((folder / name).resolve() for name in written.files),
                queries,
                folder / "cells",
                num_cells=options.num_cells,
                seed=options.seed,
                mapper=self.execution.mapper,
            )
            made.save(folder / "cells")
            cells = made.statistics()
            del made
            clock.lap("cells")
        index_options = self._index_options()
        index = None
        if index_options is not None:
            index = self._index(VectorSource(whole, scale), queries, index_options, version)
        clock.lap("index")
        if options.parquet:
            source = ParquetSource(
                whole,
                (folder / "ids.arrow").resolve(),
                options.layout,
                options.fixed_size,
                self.catalogue,
            )
            write_parquet(source, written.count, folder / "items", execution=self.execution)
            clock.lap("parquet")
        if options.dtype != "float32":
            # Keep the served precision only; cells hold their own float32 rows.
            for name in written.files:
                (folder / name).unlink()
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        return {
            "vectors": {
                "files": list(vector_files),
                "count": written.count,
                "dim": query_dim(self.policy),
                "embedding_dim": self.policy.config.embedding_dim,
                "bias": self.policy.config.item_bias,
                "dtype": options.dtype,
                "metric": "inner_product",
                "temperature": "folded into the context tower",
                "text_ids": written.text_ids,
                "precision": precision,
            },
            "catalogue": {
                "path": str(self.catalogue.path),
                "fingerprint": written.fingerprint,
                "ids_sha256": written.ids_sha256,
                "schema": self.catalogue.schema.to_dict(),
            },
            "log_schema": log.schema.to_dict(),
            "measured_on": {"part": part, "contexts": len(queries), "fingerprint": log.fingerprint},
            "context_tower": graphs,
            "cells": cells,
            "index": index,
            "parquet": {"layout": options.layout, "fixed_size": options.fixed_size}
            if options.parquet
            else None,
            "seconds": clock.seconds,
            "files": describe_files(folder, files - vector_files.keys())
            | {name: one.facts for name, one in vector_files.items()},
        }

    def _index(
        self,
        items: VectorSource,
        queries: NDArray[np.float32],
        options: IndexOptions,
        version: str,
    ) -> dict[str, Any]:
        folder, earlier, mapper = self.folder / "index", self.earlier, self.execution.mapper
        if earlier is None or not (earlier / "index").exists() or self.options.rebuild_index:
            return build_index(items, queries, folder, options, version, mapper)
        before = EarlierIndex(earlier / "index", earlier.name)
        return update_index(items, queries, folder, options, version, before, mapper)

    def _index_options(self) -> IndexOptions | None:
        wanted = self.options.index
        if wanted is None or isinstance(wanted, IndexOptions):
            return wanted
        if wanted != "auto":
            raise ConfigError(f"index must be IndexOptions, 'auto' or None, got {wanted!r}")
        try:
            import_faiss()
        except MissingExtraError:
            return None
        return IndexOptions() if self.catalogue.num_items > SMALL_CATALOGUE else None


class _Clock:
    """Seconds of the parts of an export."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self._began = round(now - self._began, 3), now


def _precision(
    queries: NDArray[np.float32],
    exact: NDArray[np.float32],
    served: NDArray[Any],
    scale: NDArray[np.float32] | None,
) -> dict[str, Any]:
    """Recall of the exact top k in the reduced precision."""
    queries = queries[:_PRECISION_CONTEXTS]
    measured = {}
    for k in (10, 100):
        if k <= len(exact):
            truth = exact_top_k(queries, exact, k)[1]
            kept = recall(exact_top_k(queries, served, k, scale)[1], truth)
            measured[f"recall@{k}"] = float(kept.mean())
    return {**measured, "contexts": len(queries)}


def _has_onnx() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxscript"))
