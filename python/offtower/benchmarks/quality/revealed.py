"""Ridge regression on the labels that a log reveals, as an upper baseline for learners.

Its settings are those with the best true value. The gap between it and a regression on all labels
is due to the log; the gap between a learner and it is due to the learner.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import linalg, sparse

from offtower.benchmarks.quality.world import QualityWorld, Value, value_of_scores
from offtower.data.simulate.features import vector_matrix

Array = NDArray[np.float64]

PENALTIES = (10.0, 30.0, 100.0, 300.0)
MOST_WEIGHTS = (1.0, 2.0, 3.0, 5.0)
IMPUTATIONS = 3


@dataclass(frozen=True)
class Revealed:
    """The distinct contexts of a log and the (context, label) pairs that it shows."""

    features: sparse.csr_matrix
    """(m, f)."""
    known: NDArray[np.bool_]
    """(m, N), whether the pair was shown at least once."""
    label: Array
    """(m, N), 1 where the pair was shown and rewarded, else 0."""
    chance: Array
    """(m, N), the probability that a known pair is shown at least once, 1 - (1 - pscore)^(rounds of
    the context); 1 elsewhere."""


def revealed(world: QualityWorld) -> Revealed:
    """Collect the pairs of a log whose rewards are a function of context and item."""
    rows = _features(world, world.log.table)
    keys = [rows.indices[a:b].tobytes() + rows.data[a:b].tobytes() for a, b in _spans(rows)]
    _, first, inverse, visits = np.unique(
        np.array(keys, dtype=object), return_index=True, return_inverse=True, return_counts=True
    )
    action = world.log.table["action"].to_numpy()
    shape = len(first), world.catalogue.num_items
    known, label, chance = np.zeros(shape, dtype=bool), np.zeros(shape), np.ones(shape)
    known[inverse, action] = True
    label[inverse, action] = world.log.table["reward"].to_numpy()
    pscore = world.log.table["pscore"].to_numpy()
    at_least_once = -np.expm1(visits[inverse] * np.log1p(-np.minimum(pscore, 1 - 1e-12)))
    chance[inverse, action] = at_least_once
    return Revealed(rows[first], known, label, chance)


def best_of_revealed(world: QualityWorld) -> tuple[Value, dict[str, float], float]:
    """Return the best ridge regression's value, every setting's greedy value, and seconds.

    Targets are either 1 / chance (at most a maximal weight) for revealed positives and 0 for all
    other pairs, or imputed: the label of revealed pairs and the last fit's prediction of others.
    """
    began = time.perf_counter()
    log = revealed(world)
    # Labels that were never rewarded have zero targets.
    found = np.flatnonzero(log.label.any(axis=0))
    known, label = log.known[:, found], log.label[:, found]
    x = ridge_design(log.features)
    test = ridge_design(_features(world, world.truth.contexts, log.features.shape[1]))
    expected = world.truth.expected(0, test.shape[0])
    values: dict[str, Value] = {}

    def add(name: str, weight: Array) -> None:
        scores = np.full((test.shape[0], world.catalogue.num_items), -np.inf)
        scores[:, found] = test @ weight
        values[name] = value_of_scores(torch.from_numpy(scores * 1e6), expected)

    gram = (x.T @ x).toarray()
    for penalty in PENALTIES:
        factor = linalg.cho_factor(gram + penalty * np.eye(len(gram)), overwrite_a=True)
        for most in MOST_WEIGHTS:
            target = label * np.minimum(1.0 / log.chance[:, found], most)
            add(f"weights to {most:g}, penalty {penalty:g}", linalg.cho_solve(factor, x.T @ target))
        weight = linalg.cho_solve(factor, x.T @ label)
        for turn in range(1, IMPUTATIONS + 1):
            target = np.where(known, label, (x @ weight).clip(0.0, 1.0))
            weight = linalg.cho_solve(factor, x.T @ target)
            add(f"imputed {turn} times, penalty {penalty:g}", weight)
    best = max(values, key=lambda name: values[name].greedy)
    facts = {name: value.greedy for name, value in values.items()}
    return values[best], facts, time.perf_counter() - began


def ridge_design(features: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return (n, f + 1) rows of norm 8 and a constant 1, as for the supervised baseline."""
    length = np.sqrt(np.asarray(features.multiply(features).sum(axis=1), dtype=np.float64))
    scaled = sparse.diags_array(8.0 / np.maximum(length[:, 0], 1e-9)) @ features
    return sparse.csr_matrix(sparse.hstack([scaled, np.ones((features.shape[0], 1))]))


def _features(world: QualityWorld, table: pa.Table, width: int | None = None) -> sparse.csr_matrix:
    spec = world.log.schema.context[0]
    column = table.column(spec.source).combine_chunks()
    if spec.kind == "vector":
        return sparse.csr_matrix(vector_matrix(column, len(column[0])))
    tokens, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    width = width or int(tokens.max()) + 1
    # Drop tokens that no logged context has.
    kept = tokens < width
    counts = np.concatenate([[0], np.cumsum(kept)])
    matrix = sparse.csr_matrix(
        (np.ones(int(counts[-1]), np.float32), tokens[kept], counts[offsets]),
        shape=(len(offsets) - 1, width),
    )
    matrix.sort_indices()
    return matrix


def _spans(matrix: sparse.csr_matrix) -> Iterator[tuple[int, int]]:
    return zip(matrix.indptr[:-1].tolist(), matrix.indptr[1:].tolist(), strict=True)
