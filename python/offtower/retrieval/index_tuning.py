"""Choose the parameters of an index by measured recall."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.errors import ConfigError
from offtower.retrieval.exact import exact_top_k, recall
from offtower.retrieval.index import AnnIndex, IndexOptions

_PROBES = tuple(2**i for i in range(13))
_EF = (16, 32, 64, 128, 256, 512, 1024, 2048)
_REFINE = (1, 2, 4, 8, 16, 32)


def tune(
    index: AnnIndex,
    queries: NDArray[np.float32],
    vectors: NDArray[Any],
    scale: NDArray[np.float32] | None,
    options: IndexOptions,
) -> dict[str, Any]:
    """Choose the cheapest parameters whose recall is two standard errors above the target on the
    first half of the queries; measure recall and latency on the second half.

    Raises:
        ConfigError: no parameters reach the target.
    """
    k = min(options.k, len(vectors))
    truth = exact_top_k(queries, vectors, k, scale)[1]
    tune = slice(0, max(1, len(queries) // 2))
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
            f"is {best}. Lower the target, or use another kind"
        )
    index.parameters = chosen
    measured = measure_held_out(index, queries, truth, options)
    measured["recall"]["tried"] = tried
    return {"parameters": chosen, **measured}


def measure_held_out(
    index: AnnIndex,
    queries: NDArray[np.float32],
    truth: NDArray[np.int64],
    options: IndexOptions,
) -> dict[str, Any]:
    """Measure recall and latency with the index's parameters on the second half of the queries.

    Args:
        truth: (n, k) items of largest inner product.
    """
    k, half = truth.shape[1], max(1, len(queries) // 2)
    held = slice(half, None) if len(queries) > half else slice(0, half)
    found = recall(index.search(queries[held], k)[1], truth[held])
    latency = []
    for query in queries[held][:200]:
        began = time.perf_counter()
        index.search(query[None], k)
        latency.append(time.perf_counter() - began)
    return {
        "recall": {
            "k": k,
            "mean": float(found.mean()),
            "std_error": float(found.std() / max(1, len(found)) ** 0.5),
            "contexts": len(found),
            "target": options.target_recall,
        },
        "latency_ms": {
            "p50": 1e3 * float(np.quantile(latency, 0.5)),
            "p99": 1e3 * float(np.quantile(latency, 0.99)),
            "threads": torch.get_num_threads(),
        },
    }


def _candidates(index: AnnIndex, options: IndexOptions) -> Iterator[dict[str, int]]:
    """Parameters in ascending cost."""
    if options.kind == "flat":
        yield {}
    elif options.kind == "hnsw":
        for ef in _EF:
            yield {"ef_search": ef}
    else:
        lists = index.index.nlist
        probes = [p for p in _PROBES if p < lists] + [lists]
        if options.kind != "ivf_pq":
            # 8-bit codes rank nearly as the vectors do: twice the candidates suffice.
            refine = {} if options.kind == "ivf_flat" else {"refine": 2}
            yield from ({"nprobe": probe, **refine} for probe in probes)
            return
        # Fewest probes first, then fewest candidates.
        for probe in probes:
            for refine_by in _REFINE:
                yield {"nprobe": probe, "refine": refine_by}
