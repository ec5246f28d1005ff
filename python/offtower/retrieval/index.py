"""Approximate search with FAISS: inner product only, built in chunks, tuned by measurement.

Inverted lists are k-means cells of the item vectors by plain distance, and are probed in the order
of the query's inner product with their centres. Assigning items by inner product too, as an index
does by default, crowds them into the cells of the longest centres.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.atomic import write_text
from offtower.errors import ConfigError, MissingExtraError, RunError
from offtower.retrieval.exact import exact_top_k, recall

Kind = Literal["flat", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"]
KINDS: tuple[str, ...] = get_args(Kind)

FILE, LISTS, FACTS = "index.faiss", "index.ivfdata", "index.json"

_CHUNK = 262_144
_TRAIN_PER_LIST = 50
_PROBES = tuple(2**i for i in range(13))
_EF = (16, 32, 64, 128, 256, 512, 1024, 2048)
_REFINE = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class IndexOptions:
    """What to build.

    Attributes:
        kind: flat, ivf_flat, ivf_sq8 (8-bit scalars), ivf_pq (product quantiser), hnsw. Candidates
            of the last three and of ivf_* are scored again with the exported vectors.
        target_recall: share of the exact top k that must be found.
        k: of that recall.
        lists: inverted lists; by the number of items where it is None.
        shard_rows: items whose lists are built in memory at a time; beyond, shards are written and
            merged on disk (ivf_* only). None builds in one piece.
        neighbours: M of hnsw.
        seed: of clustering.
    """

    kind: Kind = "ivf_flat"
    target_recall: float = 0.98
    k: int = 100
    lists: int | None = None
    shard_rows: int | None = None
    neighbours: int = 32
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
    """A FAISS index over item numbers, opened read-only.

    Args:
        index: the FAISS index.
        facts: of index.json.
        vectors: (N, D) exported vectors, to score candidates again; None takes FAISS's scores.
        scale: of int8 vectors.
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
        """Scores (n, k), falling, and item numbers (n, k); -1 and -inf where fewer were found.

        Args:
            parameters: nprobe, ef_search or refine in place of the tuned ones.
        """
        chosen = {**self.parameters, **parameters}
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        wanted = min(k * chosen.get("refine", 1), self.index.ntotal)
        kind = self.facts["kind"]
        faiss = import_faiss()
        settings = None
        if kind.startswith("ivf"):
            settings = faiss.SearchParametersIVF(nprobe=chosen["nprobe"])
        elif kind == "hnsw":
            settings = faiss.SearchParametersHNSW(efSearch=max(chosen["ef_search"], wanted))
        padded = _pad(queries, self.index.d)
        score, item = self.index.search(padded, wanted, params=settings)
        if kind != "flat":
            score, item = self._score_again(queries, item, k)
        return score[:, :k], item[:, :k]

    def _score_again(
        self, queries: NDArray[np.float32], item: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Exact scores of the candidates, best first; of equal ones the lowest number first."""
        scaled = queries if self._scale is None else queries * self._scale
        scores = np.full(item.shape, -np.inf, dtype=np.float32)
        for row, (query, candidates) in enumerate(zip(scaled, item, strict=True)):
            there = candidates >= 0
            picked = self._vectors[candidates[there]].astype(np.float32, copy=False)
            scores[row, there] = picked @ query
        order = np.lexsort((item, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(item, order, 1)

    def to_gpu(self) -> AnnIndex:
        """The same on the first GPU, where this build of FAISS has one; itself otherwise.

        HNSW stays where it is: FAISS has no such index for GPUs.
        """
        faiss = import_faiss()
        gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
        if not gpus or not hasattr(faiss, "StandardGpuResources") or self.facts["kind"] == "hnsw":
            return self
        moved = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self.index)
        return AnnIndex(moved, self.facts, self._vectors, self._scale)


def build_index(
    vectors: NDArray[Any],
    queries: NDArray[np.float32],
    directory: Path,
    options: IndexOptions,
    version: str,
    scale: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """Build, tune and write an index.

    Args:
        vectors: (N, D) exported vectors.
        queries: (n, D) queries of held-out contexts; parameters are chosen on the first half, and
            the second half says what they give.
        directory: gets index.faiss and index.json (and index.ivfdata where shards were merged).
        version: of the export, which opening the index compares.

    Returns:
        facts: kind, parameters, recall and latency as measured, build time, bytes.

    Raises:
        MissingExtraError: FAISS is not installed.
        ConfigError: no parameters reach the target.
    """
    faiss = import_faiss()
    directory.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    index, centres = _trained(faiss, vectors, scale, options)
    if options.shard_rows is None or options.shard_rows >= len(vectors):
        for part, first in _parts(vectors, scale, 0, len(vectors)):
            _add(faiss, index, centres, part, first)
        _guard(lambda: faiss.write_index(index, str(directory / FILE)), directory)
    else:
        _build_shards(faiss, index, centres, vectors, scale, directory, options.shard_rows)
    seconds = time.perf_counter() - began
    facts: dict[str, Any] = {
        "version": version,
        "kind": options.kind,
        "metric": "inner_product",
        "faiss": faiss.__version__,
        "count": len(vectors),
        "dim": int(vectors.shape[1]),
        "options": asdict(options),
        "build_seconds": seconds,
        "bytes": sum(
            (directory / f).stat().st_size for f in (FILE, LISTS) if (directory / f).exists()
        ),
    }
    opened = AnnIndex(_read(faiss, directory), facts, vectors, scale)
    facts |= _tune(opened, queries, vectors, scale, options)
    write_text(directory / FACTS, json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return facts


def open_index(
    directory: Path,
    version: str,
    vectors: NDArray[Any],
    scale: NDArray[np.float32] | None = None,
) -> AnnIndex:
    """Open an index memory-mapped and read-only, and check that it is of these vectors.

    Raises:
        RunError: a file is damaged, or the index is of another version, metric, count or dimension.
        MissingExtraError: FAISS is not installed.
    """
    faiss = import_faiss()
    path = directory / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        found, _ = facts["version"], facts["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"the index at '{directory}' cannot be read: {error}") from error
    if found != version:
        raise RunError(
            f"the index at '{directory}' is of version {found}, the towers are of {version}: their "
            "inner products mean nothing; export again"
        )
    index = _read(faiss, directory)
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise RunError(f"the index at '{directory}' does not search by inner product; export again")
    if (index.ntotal, index.d) != (len(vectors), padded_dim(facts["kind"], vectors.shape[1])):
        raise RunError(
            f"the index at '{directory}' holds {index.ntotal:,} vectors of {index.d} numbers, the "
            f"export has {vectors.shape[0]:,} of {vectors.shape[1]}; export again"
        )
    return AnnIndex(index, facts, vectors, scale)


def import_faiss() -> Any:
    """FAISS, taking as many threads as torch.

    Each has an OpenMP runtime of its own: together they must not ask for more than the machine has.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise MissingExtraError("faiss-cpu", "ann", "an approximate index") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _trained(
    faiss: Any, vectors: NDArray[Any], scale: NDArray[np.float32] | None, options: IndexOptions
) -> tuple[Any, Any]:
    """An empty, trained index, and the centres of its lists as an index by plain distance."""
    count, dim = vectors.shape
    ip = faiss.METRIC_INNER_PRODUCT
    if options.kind == "flat":
        return faiss.IndexFlatIP(dim), None
    if options.kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, options.neighbours, ip)
        index.hnsw.efConstruction = max(200, 4 * options.neighbours)
        return index, None
    lists = options.lists or max(1, min(round(4 * count**0.5), count // 39))
    width = padded_dim(options.kind, dim)
    rows = min(count, max(_TRAIN_PER_LIST * lists, 65_536))
    picked = np.sort(np.random.default_rng(options.seed).choice(count, rows, replace=False))
    sample = _pad(_float32(vectors[picked], scale), width)
    means = faiss.Kmeans(
        width,
        lists,
        niter=10,
        seed=options.seed + 1,
        min_points_per_centroid=1,
        max_points_per_centroid=_TRAIN_PER_LIST,
    )
    means.train(sample)
    quantiser = faiss.IndexFlatIP(width)
    quantiser.add(means.centroids)
    if options.kind == "ivf_flat":
        index = faiss.IndexIVFFlat(quantiser, width, lists, ip)
    elif options.kind == "ivf_sq8":
        sq8 = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(quantiser, width, lists, sq8, ip)
    else:
        index = faiss.IndexIVFPQ(quantiser, width, lists, width // 2, 8, ip)
        index.pq.cp.niter = 10
        index.pq.cp.max_points_per_centroid = 64
    quantiser.this.disown()
    index.own_fields = True
    index.train(sample)
    return index, means.index


def padded_dim(kind: str, dim: int) -> int:
    """Numbers a vector has in the index; a product quantiser takes them in pairs."""
    return dim + dim % 2 if kind == "ivf_pq" else dim


def _pad(part: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    if part.shape[1] == width:
        return part
    return np.pad(part, ((0, 0), (0, width - part.shape[1])))


def _add(faiss: Any, index: Any, centres: Any, part: NDArray[np.float32], first: int) -> None:
    """Add items first, first + 1, ... to the lists of their nearest centres."""
    if centres is None:
        index.add(part)
        return
    part = np.ascontiguousarray(_pad(part, index.d))
    lists = np.ascontiguousarray(centres.search(part, 1)[1].reshape(-1), dtype=np.int64)
    ids = np.arange(first, first + len(part), dtype=np.int64)
    pointer = faiss.swig_ptr
    index.add_core(len(part), pointer(part), pointer(ids), pointer(lists))


def _parts(
    vectors: NDArray[Any], scale: NDArray[np.float32] | None, start: int, stop: int
) -> Iterator[tuple[NDArray[np.float32], int]]:
    for first in range(start, stop, _CHUNK):
        yield _float32(vectors[first : min(first + _CHUNK, stop)], scale), first


def _float32(part: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    wide = np.ascontiguousarray(part, dtype=np.float32)
    return wide if scale is None else wide * scale


def _build_shards(
    faiss: Any,
    trained: Any,
    centres: Any,
    vectors: NDArray[Any],
    scale: NDArray[np.float32] | None,
    directory: Path,
    shard_rows: int,
) -> None:
    """Fill a copy of the trained index shard by shard, and merge the lists on disk."""
    from faiss.contrib.ondisk import merge_ondisk

    names = []
    for number, start in enumerate(range(0, len(vectors), shard_rows)):
        shard = faiss.clone_index(trained)
        stop = min(start + shard_rows, len(vectors))
        for part, first in _parts(vectors, scale, start, stop):
            _add(faiss, shard, centres, part, first)
        names.append(str(directory / f"shard-{number:05d}.faiss"))
        _guard(lambda s=shard: faiss.write_index(s, names[-1]), directory)  # type: ignore[misc]
    _guard(lambda: merge_ondisk(trained, names, str(directory / LISTS)), directory)
    _guard(lambda: faiss.write_index(trained, str(directory / FILE)), directory)
    for name in names:
        Path(name).unlink()


def _read(faiss: Any, directory: Path) -> Any:
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
            # Its threads, made anew for each search, cost more than the pages they fetch.
            lists.prefetch_nthread = 0
    return index


def _guard(write: Callable[[], Any], directory: Path) -> None:
    """FAISS's write errors as one that names the folder."""
    try:
        write()
    except RuntimeError as error:
        raise RunError(
            f"the index could not be written to '{directory}' (is the disk full?): "
            f"{str(error).strip().splitlines()[-1]}"
        ) from error


def _tune(
    index: AnnIndex,
    queries: NDArray[np.float32],
    vectors: NDArray[Any],
    scale: NDArray[np.float32] | None,
    options: IndexOptions,
) -> dict[str, Any]:
    """The cheapest parameters whose recall reaches the target on the first half of the queries, by
    two standard errors; recall and latency on the second half."""
    k = min(options.k, len(vectors))
    truth = exact_top_k(queries, vectors, k, scale)[1]
    half = max(1, len(queries) // 2)
    tune, held = slice(0, half), slice(half, None) if len(queries) > half else slice(0, half)
    tried = []
    chosen: dict[str, int] | None = None
    for parameters in _candidates(index, options):
        found = recall(index.search(queries[tune], k, **parameters)[1], truth[tune])
        low = found.mean() - 2.0 * found.std() / len(found) ** 0.5
        tried.append({**parameters, "recall": float(found.mean()), "at_least": float(low)})
        if low >= options.target_recall or options.kind == "flat":
            chosen = parameters
            break
    if chosen is None:
        best = max(tried, key=lambda t: t["recall"])
        raise ConfigError(
            f"no parameters of '{options.kind}' reach recall@{k} {options.target_recall}: the best "
            f"is {best}. Lower the target, or take another kind"
        )
    index.parameters = chosen
    found = recall(index.search(queries[held], k)[1], truth[held])
    latency = []
    for query in queries[held][:200]:
        began = time.perf_counter()
        index.search(query[None], k)
        latency.append(time.perf_counter() - began)
    return {
        "parameters": chosen,
        "recall": {
            "k": k,
            "mean": float(found.mean()),
            "std_error": float(found.std() / max(1, len(found)) ** 0.5),
            "contexts": len(found),
            "target": options.target_recall,
            "tried": tried,
        },
        "latency_ms": {
            "p50": 1e3 * float(np.quantile(latency, 0.5)),
            "p99": 1e3 * float(np.quantile(latency, 0.99)),
            "threads": torch.get_num_threads(),
        },
    }


def _candidates(index: AnnIndex, options: IndexOptions) -> Iterator[dict[str, int]]:
    """Parameters in rising cost."""
    if options.kind == "flat":
        yield {}
    elif options.kind == "hnsw":
        for ef in _EF:
            yield {"ef_search": ef}
    else:
        lists = index.index.nlist
        probes = [p for p in _PROBES if p < lists] + [lists]
        if options.kind != "ivf_pq":
            # Codes of 8 bits order nearly as the vectors do; twice as many candidates suffice.
            refine = {} if options.kind == "ivf_flat" else {"refine": 2}
            yield from ({"nprobe": probe, **refine} for probe in probes)
            return
        # First the probes that would do with perfect codes, then as few candidates as possible.
        for probe in probes:
            for refine_by in _REFINE:
                yield {"nprobe": probe, "refine": refine_by}
