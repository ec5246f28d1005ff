"""What a supervised model reaches that sees the labels which a log reveals, and nothing else.

A yardstick, not a method: its settings are those that turn out best on the truth. The distance from
it to the model that sees all labels is information that the log does not hold; the distance from a
learner to it is the learner's.
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

from offtower.benchmarks.quality.world import QualityWorld, Value, of_scores
from offtower.data.simulate.features import vector_matrix

Array = NDArray[np.float64]

PENALTIES = (10.0, 30.0, 100.0, 300.0)
MOST_WEIGHTS = (1.0, 2.0, 3.0, 5.0)
IMPUTATIONS = 3


@dataclass(frozen=True)
class Revealed:
    """Distinct contexts of a log, and what it says of each (context, label) pair."""

    features: sparse.csr_matrix
    """(m, f)."""
    known: NDArray[np.bool_]
    """(m, N) shown at least once."""
    label: Array
    """(m, N) 1 where it was shown and rewarded, else 0."""
    chance: Array
    """(m, N) that the log shows a known pair at least once: 1 - (1 - pscore)^(rounds of the
    context); 1 elsewhere."""


def revealed(world: QualityWorld) -> Revealed:
    """Read the log of a label world, whose rewards are a function of context and item."""
    rows = _features(world, world.log.table)
    keys = [rows.indices[a:b].tobytes() + rows.data[a:b].tobytes() for a, b in _spans(rows)]
    _, first, place, visits = np.unique(
        np.array(keys, dtype=object), return_index=True, return_inverse=True, return_counts=True
    )
    action = world.log.table["action"].to_numpy()
    shape = len(first), world.catalogue.num_items
    known, label, chance = np.zeros(shape, dtype=bool), np.zeros(shape), np.ones(shape)
    known[place, action] = True
    label[place, action] = world.log.table["reward"].to_numpy()
    pscore = world.log.table["pscore"].to_numpy()
    chance[place, action] = -np.expm1(visits[place] * np.log1p(-np.minimum(pscore, 1 - 1e-12)))
    return Revealed(rows[first], known, label, chance)


def best_of_revealed(world: QualityWorld) -> tuple[Value, dict[str, float], float]:
    """The best ridge regression of revealed labels: its value, each setting's, and seconds.

    Targets of a setting are 1 for revealed positives, divided by the chance of having been shown
    (up to a largest weight), and 0 for all other pairs; or, imputed: the label where the log shows
    the pair and what the model itself predicts elsewhere, again and again.
    """
    began = time.perf_counter()
    log = revealed(world)
    # Labels that were never rewarded would be 0 everywhere.
    found = np.flatnonzero(log.label.any(axis=0))
    known, label = log.known[:, found], log.label[:, found]
    x = ridge_design(log.features)
    test = ridge_design(_features(world, world.truth.contexts, log.features.shape[1]))
    expected = world.truth.expected(0, test.shape[0])
    values: dict[str, Value] = {}

    def tried(name: str, weight: Array) -> None:
        scores = np.full((test.shape[0], world.catalogue.num_items), -np.inf)
        scores[:, found] = test @ weight
        values[name] = of_scores(torch.from_numpy(scores * 1e6), expected)

    gram = (x.T @ x).toarray()
    for penalty in PENALTIES:
        factor = linalg.cho_factor(gram + penalty * np.eye(len(gram)), overwrite_a=True)
        for most in MOST_WEIGHTS:
            target = label * np.minimum(1.0 / log.chance[:, found], most)
            tried(
                f"weights to {most:g}, penalty {penalty:g}", linalg.cho_solve(factor, x.T @ target)
            )
        weight = linalg.cho_solve(factor, x.T @ label)
        for turn in range(1, IMPUTATIONS + 1):
            target = np.where(known, label, (x @ weight).clip(0.0, 1.0))
            weight = linalg.cho_solve(factor, x.T @ target)
            tried(f"imputed {turn} times, penalty {penalty:g}", weight)
    best = max(values, key=lambda name: values[name].greedy)
    facts = {name: value.greedy for name, value in values.items()}
    return values[best], facts, time.perf_counter() - began


def ridge_design(features: sparse.csr_matrix) -> sparse.csr_matrix:
    """(n, f + 1) rows of length 8 and a one, as the supervised landmark has them."""
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
    # A token that no logged context has cannot be learned from.
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
