"""Take over the clusters of an earlier index for added, removed and moved items.

Only the lists of an IVF index are filled anew: each item is assigned to the nearest centroid of the
earlier index, whose clustering and tuned parameters stay. That is exact for any change of the
catalogue, but as items move away from the centroids the same number of probed lists finds less.
Below the target recall on probes, contexts that nothing was tuned on, the index is built anew.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.atomic import write_text
from offtower.checksums import read_json
from offtower.errors import RunError
from offtower.mapping import Mapper
from offtower.retrieval.exact import exact_top_k
from offtower.retrieval.index import (
    FACTS,
    FILE,
    LISTS,
    AnnIndex,
    IndexOptions,
    import_faiss,
    read_index,
)
from offtower.retrieval.index_building import add_items, build_index, guard_write
from offtower.retrieval.index_tuning import measure_held_out
from offtower.retrieval.vector_source import VectorSource


@dataclass(frozen=True)
class EarlierIndex:
    """The index of an earlier export.

    directory: its folder `index`. version: of that export.
    """

    directory: Path
    version: str

    @property
    def facts(self) -> dict[str, Any] | None:
        """Content of its index.json; None where it cannot be read."""
        try:
            return read_json(self.directory / FACTS)
        except (OSError, RunError):
            return None


def update_index(
    items: VectorSource,
    queries: NDArray[np.float32],
    directory: Path,
    options: IndexOptions,
    version: str,
    earlier: EarlierIndex,
    mapper: Mapper | None = None,
) -> dict[str, Any]:
    """Fill the clusters of an earlier index with all items, or build an index anew.

    Args:
        queries: (n, D); recall is measured on the second half, as `build_index` does.
        earlier: the index whose clusters are taken over. Others are as for `build_index`.

    Returns:
        The facts of the index, with `clusters_of`, the export whose clusters it has, or
        `rebuilt_because`.

    Raises:
        MissingExtraError, ConfigError, RunError: as `build_index`.
    """
    reason = _obstacle(earlier, options, items.open().shape[1])
    if reason is None:
        facts = _filled(items, queries, directory, version, earlier, mapper or Mapper())
        recall = facts["recall"]
        if recall["mean"] >= options.target_recall:
            text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
            write_text(directory / FACTS, text)
            return facts
        (directory / FILE).unlink()
        reason = (
            f"with the clusters of export {facts['clusters_of']} recall@{recall['k']} fell to "
            f"{recall['mean']:.4f}, below {options.target_recall:g}"
        )
    built = build_index(items, queries, directory, options, version, mapper)
    built["rebuilt_because"] = reason
    write_text(directory / FACTS, json.dumps(built, indent=2, sort_keys=True) + "\n")
    return built


def _obstacle(earlier: EarlierIndex, options: IndexOptions, dim: int) -> str | None:
    """Why clusters cannot be taken over; None where they can."""
    facts = earlier.facts
    if facts is None:
        return f"export {earlier.version} has no index that can be read"
    if not options.kind.startswith("ivf"):
        return f"an index of kind {options.kind} has no clusters to take over"
    if facts["options"] != asdict(options) or facts["dim"] != dim:
        return f"the index of export {earlier.version} has other options or dimensions"
    if (earlier.directory / LISTS).exists():
        return f"the index of export {earlier.version} was merged from shards"
    return None


def _filled(
    items: VectorSource,
    queries: NDArray[np.float32],
    directory: Path,
    version: str,
    earlier: EarlierIndex,
    mapper: Mapper,
) -> dict[str, Any]:
    faiss, before, vectors = import_faiss(), earlier.facts, items.open()
    assert before is not None, "see _obstacle"
    options = IndexOptions(**before["options"])
    directory.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    index = faiss.read_index(str(earlier.directory / FILE))
    index.reset()
    add_items(index, index.quantizer.reconstruct_n(0, index.nlist), items, mapper)
    guard_write(lambda: faiss.write_index(index, str(directory / FILE)), directory)
    facts: dict[str, Any] = {
        **{name: before[name] for name in ("kind", "metric", "dim", "options", "parameters")},
        "version": version,
        "faiss": faiss.__version__,
        "count": len(vectors),
        "build_seconds": time.perf_counter() - began,
        "bytes": (directory / FILE).stat().st_size,
        "clusters_of": before.get("clusters_of", earlier.version),
        "updates": int(before.get("updates", 0)) + 1,
    }
    opened = AnnIndex(read_index(faiss, directory), facts, vectors, items.scale)
    k = min(options.k, len(vectors))
    truth = exact_top_k(queries, vectors, k, items.scale)[1]
    return facts | measure_held_out(opened, queries, truth, options)
