"""Indices and draws with propensities over a million trained item vectors.

Simulates a log over 20,000 items, trains a policy on it, and embeds a million items of the same
world with its item tower, which uses features only. Gaussian vectors are measured for comparison.

    python benchmarks/retrieval.py --json retrieval.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.encoding import to_tensors
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.models import load_policy
from offtower.retrieval import IndexOptions, PropensitySampler
from offtower.retrieval.index_building import build_index
from offtower.retrieval.partitioning import build_cells
from offtower.retrieval.tower import ContextTower
from offtower.retrieval.vector_source import VectorSource
from offtower.training.run import train_run


def trained(folder: Path, objective: str, items: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return item vectors (items, dim + 1) and queries (1000, dim + 1) of a trained policy."""
    if not (folder / "train").exists():
        small = SimulatedWorld(20_000, WorldSettings(16, 16, 16, feature_kinds="all"))
        write_catalogue(folder / "catalogue", small.catalogue_table(), small.catalogue_schema)
        write_log(folder / "train", small.log(60_000, seed=1), small.log_schema)
    tower = {"hidden_layer_sizes": [64]}
    config = parse_config(
        {
            "name": objective,
            "runs": str(folder / "runs"),
            "data": {"train": str(folder / "train"), "catalogue": str(folder / "catalogue")},
            "policy": {
                "embedding_dim": dim,
                "item_bias": True,
                "context_tower": tower,
                "item_tower": tower,
            },
            "reward_model": {"kind": "factored", "folds": 1, "epochs": 6, "embedding_dim": 16},
            "objective": {"name": objective},
            "training": {"epochs": 2, "learning_rate": 0.003},
        }
    )
    if not (config.run_directory / "policy").exists():
        train_run(config)
    policy, _ = load_policy(config.run_directory / "policy")
    world = SimulatedWorld(items, WorldSettings(16, 16, 16, feature_kinds="all"))
    table = world.catalogue_table()
    vectors = np.empty((items, dim + 1), dtype=np.float32)
    with torch.no_grad():
        for first in range(0, items, 65_536):
            part = policy.item_encoding.encode(table.slice(first, 65_536))
            embedding, bias = policy.item_tower(to_tensors(part))
            assert bias is not None
            vectors[first : first + len(embedding), :dim] = embedding.numpy()
            vectors[first : first + len(embedding), dim] = bias.numpy()
    return vectors, ContextTower.of(policy).embed(world.contexts(1000, seed=77))


def gaussian(items: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return normal vectors whose logits have standard deviation 1.75, as the trained ones do."""
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((items, dim + 1), dtype=np.float32)
    vectors[:, dim] = 0.0
    queries = rng.standard_normal((1000, dim + 1), dtype=np.float32) * np.float32(1.75 / dim**0.5)
    queries[:, dim] = 1.0
    return vectors, queries


def measure_index(vectors: np.ndarray, queries: np.ndarray, kind: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        try:
            source, options = VectorSource(vectors), IndexOptions(kind=kind)
            facts = build_index(source, queries[:400], Path(place), options, "benchmark")
        except ValueError as error:
            return {"kind": kind, "refused": str(error)}
    return {
        "kind": kind,
        "parameters": facts["parameters"],
        "recall@100": facts["recall"]["mean"],
        "build_seconds": facts["build_seconds"],
        "mib": facts["bytes"] / 2**20,
        "ms": facts["latency_ms"]["p50"],
        "queries_per_second": 1e3 / facts["latency_ms"]["p50"],
    }


def measure_draws(vectors: np.ndarray, queries: np.ndarray) -> dict[str, Any]:
    """Measure the latency of each mode, interleaved by query, and the error of pscore."""
    began = time.perf_counter()
    cells = build_cells(vectors, queries[:500])
    seconds = time.perf_counter() - began
    sampler = PropensitySampler(cells)
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {"softmax": [], "cells": [], "exact": []}
    errors, stated, rows = [], [], []
    for number, query in enumerate(queries[500:]):
        for mode, taken in times.items():
            start = time.perf_counter()
            drawn = sampler.draw(query, rng, mode=mode)  # type: ignore[arg-type]
            taken.append(time.perf_counter() - start)
            if mode == "softmax":
                kept = drawn
        rows.append(kept.rows_scored)
        if number < 300:
            logit = (vectors @ query).astype(np.float64)
            top = logit.max()
            log_normalizer = top + np.log(np.exp(logit - top).sum())
            truth = np.exp(logit[kept.item[0]] - log_normalizer)
            errors.append(kept.pscore[0] / truth - 1.0)
            stated.append(kept.relative_error[0])
    result: dict[str, Any] = {"build_seconds": seconds, "cells": cells.num_cells}
    for mode, taken in times.items():
        result[f"{mode}_ms"] = [1e3 * float(np.quantile(taken, q)) for q in (0.5, 0.99)]
    result |= {
        "p99_ratio": result["softmax_ms"][1] / result["exact_ms"][1],
        "rows_scored": [float(np.quantile(rows, q)) for q in (0.5, 0.99)],
        "error_rms": float(np.sqrt(np.mean(np.square(errors)))),
        "error_max": float(np.abs(errors).max()),
        "share_within_1_percent": float(np.mean(np.abs(errors) <= 0.01)),
        "stated_rms": float(np.sqrt(np.mean(np.square(stated)))),
        **_coverage(np.asarray(errors), np.asarray(stated)),
    }
    return result


def _coverage(error: np.ndarray, stated: np.ndarray) -> dict[str, float]:
    """Return the fractions of errors within one and two stated ones; exact pscores round."""
    size = np.abs(error) / np.maximum(stated, 1e-6)
    return {f"within_{times}_stated": float(np.mean(size <= times)) for times in (1, 2)}


def measure_errors(vectors: np.ndarray, queries: np.ndarray, scale: float) -> dict[str, float]:
    """Measure the errors of pscore with logits multiplied by `scale`."""
    sampler = PropensitySampler(build_cells(vectors, queries[:500]))
    rng = np.random.default_rng(1)
    errors, stated, rows = [], [], []
    for query in queries[500:700] * np.float32(scale):
        logit = (vectors @ query).astype(np.float64)
        top = logit.max()
        log_normalizer = top + np.log(np.exp(logit - top).sum())
        for _ in range(3):
            drawn = sampler.draw(query, rng)
            truth = np.exp(logit[drawn.item[0]] - log_normalizer)
            errors.append(drawn.pscore[0] / truth - 1.0)
            stated.append(drawn.relative_error[0])
            rows.append(drawn.rows_scored)
    return {
        "scale": scale,
        "rows_scored": float(np.median(rows)),
        "error_rms": float(np.sqrt(np.mean(np.square(errors)))),
        "error_max": float(np.abs(errors).max()),
        "stated_rms": float(np.sqrt(np.mean(np.square(stated)))),
        **_coverage(np.asarray(errors), np.asarray(stated)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--scales", type=float, nargs="*", help="measure only errors of pscore, at these scales"
    )
    parser.add_argument("--kinds", nargs="*", default=["flat", "ivf_flat", "ivf_sq8", "ivf_pq"])
    parser.add_argument("--vectors", nargs="*", default=["weighted_likelihood", "clipped_dr"])
    parser.add_argument(
        "--folder", type=Path, help="keep the log and the runs here, and reuse them"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for name in arguments.vectors:
            if name == "gaussian":
                vectors, queries = gaussian(arguments.items, arguments.dim)
            else:
                vectors, queries = trained(folder, name, arguments.items, arguments.dim)
            if arguments.scales:
                results[name] = [measure_errors(vectors, queries, f) for f in arguments.scales]
                for line in results[name]:
                    print(name, json.dumps(line), flush=True)
                continue
            results[name] = {"draws": measure_draws(vectors, queries), "indices": []}
            print(name, json.dumps(results[name]["draws"]), flush=True)
            for kind in arguments.kinds:
                measured = measure_index(vectors, queries, kind)
                results[name]["indices"].append(measured)
                print(name, json.dumps(measured), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
