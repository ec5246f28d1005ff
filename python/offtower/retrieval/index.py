"""Approximate search by inner product with FAISS: options, opening and searching.

`index_building` builds indices, `index_tuning` chooses their parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.checksums import read_json
from offtower.errors import ConfigError, MissingExtraError, RunError
from offtower.ops import bit_counts

Kind = Literal["flat", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"]
KINDS: tuple[str, ...] = get_args(Kind)

FILE, LISTS, FACTS = "index.faiss", "index.ivfdata", "index.json"


@dataclass(frozen=True)
class IndexOptions:
    """Options of an approximate index.

    Attributes:
        kind: flat, ivf_flat, ivf_sq8 (8-bit scalar quantizer), ivf_pq (product quantizer) or hnsw.
            All but flat rescore their candidates with the exported vectors.
        target_recall: share of the exact top k that must be found.
        k: k of that recall.
        lists: number of inverted lists; None derives it from the number of items.
        shard_rows: items per shard; shards are built in memory one at a time and merged on disk
            (ivf_* only). None builds in one piece.
        neighbors: M of hnsw.
        seed: seed of the clustering.
    """

    kind: Kind = "ivf_flat"
    target_recall: float = 0.98
    k: int = 100
    lists: int | None = None
    shard_rows: int | None = None
    neighbors: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"the index must be one of {', '.join(KINDS)}, got '{self.kind}'")
        if not 0.0 < self.target_recall <= 1.0:
            raise ConfigError(f"target_recall must lie in (0, 1], got {self.target_recall}")
        if self.k < 1:
            raise ConfigError(f"k of the recall must be at least 1, got {self.k}")
        if self.shard_rows is not None and not self.kind.startswith("ivf"):
            raise ConfigError(f"only ivf_* indices are built in shards, not '{self.kind}'")


class AnnIndex:
    """A read-only FAISS index over item numbers.

    Args:
        index: the FAISS index.
        facts: content of index.json.
        vectors: (N, D) exported vectors, for rescoring candidates.
        scale: (D,) scale of int8 vectors.
    """

    def __init__(
        self,
        index: Any,
        facts: dict[str, Any],
        vectors: NDArray[Any],
        scale: NDArray[np.float32] | None = None,
    ) -> None:
        self.index, self.facts, self._vectors, self._scale = index, facts, vectors, scale
        self.parameters: dict[str, int] = dict(facts.get("parameters", {}))

    def search(
        self, queries: NDArray[np.float32], k: int, **parameters: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return descending scores (n, k) and item numbers (n, k); -inf and -1 pad missing results.

        Args:
            parameters: nprobe, ef_search or refine, overriding the tuned values.
        """
        return self._search(queries, k, {**self.parameters, **parameters}, None)

    def search_among(
        self, queries: NDArray[np.float32], k: int, words: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return what `search` does, among the items of a bitmap.

        The tuned effort grows with 1 / the share of these items, so that as many of them are scored
        as items in a search without a bitmap.

        Args:
            words: (ceil(N / 64),), as in `Eligibility.bitmap`.
        """
        count = int(bit_counts(torch.from_numpy(words[None]))[0])
        share = max(1, count) / len(self._vectors)
        chosen = dict(self.parameters)
        for name, most in (
            ("nprobe", getattr(self.index, "nlist", 1)),
            ("ef_search", self.index.ntotal),
        ):
            if name in chosen:
                chosen[name] = min(most, math.ceil(chosen[name] / share))
        selector = import_faiss().IDSelectorBitmap(words.view(np.uint8))
        return self._search(queries, k, chosen, selector)

    def _search(
        self, queries: NDArray[np.float32], k: int, chosen: dict[str, int], selector: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        wanted = min(k * chosen.get("refine", 1), self.index.ntotal)
        kind = self.facts["kind"]
        faiss = import_faiss()
        settings = None
        if kind.startswith("ivf"):
            settings = faiss.SearchParametersIVF(nprobe=chosen["nprobe"], sel=selector)
        elif kind == "hnsw":
            effort = max(chosen["ef_search"], wanted)
            settings = faiss.SearchParametersHNSW(efSearch=effort, sel=selector)
        elif selector is not None:
            settings = faiss.SearchParameters(sel=selector)
        padded = pad(queries, self.index.d)
        score, item = self.index.search(padded, wanted, params=settings)
        if kind != "flat":
            score, item = self._rescore(queries, item, k)
        return score[:, :k], item[:, :k]

    def _rescore(
        self, queries: NDArray[np.float32], item: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Exact scores of the candidates, descending; ties go to the lowest number."""
        scaled = queries if self._scale is None else queries * self._scale
        scores = np.full(item.shape, -np.inf, dtype=np.float32)
        for row, (query, candidates) in enumerate(zip(scaled, item, strict=True)):
            there = candidates >= 0
            picked = self._vectors[candidates[there]].astype(np.float32, copy=False)
            scores[row, there] = picked @ query
        order = np.lexsort((item, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(item, order, 1)


def open_index(
    directory: Path,
    version: str,
    vectors: NDArray[Any],
    scale: NDArray[np.float32] | None = None,
) -> AnnIndex:
    """Open an index, memory-mapped and read-only, and check that it belongs to the vectors.

    Raises:
        RunError: a file is damaged, or version, metric, count or dimension differ.
        MissingExtraError: FAISS is not installed.
    """
    faiss = import_faiss()
    path = directory / FACTS
    try:
        facts = read_json(path)
    except FileNotFoundError:
        raise RunError(f"'{path}' is missing; export again") from None
    if facts.get("kind") not in KINDS:
        raise RunError(f"'{path}' is damaged: unknown kind {facts.get('kind')!r}; export again")
    if facts.get("version") != version:
        raise RunError(
            f"the index at '{directory}' is of version {facts.get('version')}, the towers are of "
            f"{version}: their inner products mean nothing; export again"
        )
    index = read_index(faiss, directory)
    if index.metric_type != metric_of(faiss, facts["kind"]):
        raise RunError(f"the index at '{directory}' does not search by inner product; export again")
    if (index.ntotal, index.d) != (len(vectors), padded_dim(facts["kind"], vectors.shape[1])):
        raise RunError(
            f"the index at '{directory}' holds {index.ntotal:,} vectors of {index.d} numbers, the "
            f"export has {vectors.shape[0]:,} of {vectors.shape[1]}; export again"
        )
    return AnnIndex(index, facts, vectors, scale)


def import_faiss() -> Any:
    """Import FAISS and give it torch's number of threads.

    FAISS and torch have separate OpenMP runtimes, which do not share thread counts.

    Raises:
        MissingExtraError: FAISS is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise MissingExtraError("faiss-cpu", "ann", "an approximate index") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def padded_dim(kind: str, dim: int) -> int:
    """Dimension of the vectors in the index: even for product quantization, and one more for a
    graph (`index_building`)."""
    if kind == "hnsw":
        return dim + 1
    return dim + dim % 2 if kind == "ivf_pq" else dim


def metric_of(faiss: Any, kind: str) -> int:
    """Inner product, or the equivalent Euclidean distance of a graph (`index_building`)."""
    return int(faiss.METRIC_L2 if kind == "hnsw" else faiss.METRIC_INNER_PRODUCT)


def pad(part: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    if part.shape[1] == width:
        return part
    return np.pad(part, ((0, 0), (0, width - part.shape[1])))


def read_index(faiss: Any, directory: Path) -> Any:
    path = directory / FILE
    flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
    if (directory / LISTS).exists():
        flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
    try:
        index = faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise RunError(
            f"the index '{path}' cannot be read (truncated or damaged): "
            f"{str(error).strip().splitlines()[-1]}; export again"
        ) from error
    if hasattr(index, "invlists"):
        lists = faiss.downcast_InvertedLists(index.invlists)
        if hasattr(lists, "prefetch_nthread"):
            # Starting prefetch threads for each search costs more than it saves.
            lists.prefetch_nthread = 0
    return index
