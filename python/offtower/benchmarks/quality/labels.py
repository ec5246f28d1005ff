"""Multi-label data sets as bandit feedback: an action is a label, the reward is 1 if it applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from offtower.benchmarks.quality.world import QualityWorld, Truth
from offtower.data.catalogue import Catalogue
from offtower.data.log import TableLog
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.simulate.features import vector_array
from offtower.errors import DataError

Array = NDArray[np.float32]


@dataclass(frozen=True)
class LabelSet:
    """A multi-label data set, split into training and test examples."""

    name: str
    train_features: sparse.csr_matrix
    train_labels: sparse.csr_matrix
    test_features: sparse.csr_matrix
    test_labels: sparse.csr_matrix
    as_tokens: bool = True
    """Whether features are a bag of tokens; otherwise they are one dense vector."""


def load_label_set(prefix: str) -> LabelSet:
    """Read `PREFIX-train.npz` and `PREFIX-test.npz`.

    Each file holds two CSR matrices: X_data, X_indices, X_indptr and X_shape for the features, and
    the same with Y_ for the labels.

    Raises:
        DataError: A file or an array is missing.
    """
    parts = []
    for part in ("train", "test"):
        path = Path(f"{prefix}-{part}.npz")
        try:
            with np.load(path, allow_pickle=False) as content:
                for side in ("X", "Y"):
                    parts.append(
                        sparse.csr_matrix(
                            tuple(content[f"{side}_{x}"] for x in ("data", "indices", "indptr")),
                            shape=tuple(content[f"{side}_shape"]),
                            dtype=np.float32,
                        )
                    )
        except FileNotFoundError:
            raise DataError(
                f"no label set at '{path}'; --data PREFIX reads PREFIX-train.npz and "
                "PREFIX-test.npz"
            ) from None
        except KeyError as error:
            raise DataError(f"'{path}' has no array {error}") from None
    return LabelSet(Path(prefix).name, parts[0], parts[1], parts[2], parts[3])


def digits(seed: int) -> LabelSet:
    """Return scikit-learn's digits (64 features, 10 labels, 1,797 examples), half as test set."""
    from sklearn.datasets import load_digits

    features, target = load_digits(return_X_y=True)
    order = np.random.default_rng([seed, 7]).permutation(len(target))
    x = sparse.csr_matrix((features[order] / 16.0).astype(np.float32))
    y = sparse.csr_matrix(np.eye(10, dtype=np.float32)[target[order]])
    half = len(target) // 2
    return LabelSet("digits", x[:half], y[:half], x[half:], y[half:], as_tokens=False)


def long_tail(
    seed: int, *, labels: int = 3000, examples: int = 10_000, tokens: int = 4000
) -> LabelSet:
    """Simulate sparse texts with labels whose frequencies follow a Zipf distribution.

    Each label has 3 to 8 words, drawn from a Zipf vocabulary. An example has one to four labels and
    contains each of their words with probability 0.6, plus 5 to 15 background words.
    """
    rng = np.random.default_rng([seed, 8])
    popularity = 1.0 / np.arange(3, labels + 3) ** 0.9
    background = 1.0 / np.arange(5, tokens + 5) ** 0.8
    popularity, background = popularity / popularity.sum(), background / background.sum()
    # Words of labels follow a flatter distribution than background words.
    flat = np.sqrt(background) / np.sqrt(background).sum()
    words = [rng.choice(tokens, size=rng.integers(3, 9), p=flat) for _ in range(labels)]
    total = examples + 2000
    x, y = (
        sparse.lil_matrix((total, tokens), dtype=np.float32),
        sparse.lil_matrix((total, labels), dtype=np.float32),
    )
    for i in range(total):
        own = np.unique(rng.choice(labels, size=rng.integers(1, 5), p=popularity))
        seen = [words[label][rng.random(len(words[label])) < 0.6] for label in own]
        seen.append(rng.choice(tokens, size=rng.integers(5, 16), p=background))
        x[i, np.unique(np.concatenate(seen))] = 1.0
        y[i, own] = 1.0
    x, y = x.tocsr(), y.tocsr()
    return LabelSet("long tail", x[:examples], y[:examples], x[examples:], y[examples:])


def as_feedback(
    labels: LabelSet,
    rounds: int,
    seed: int,
    *,
    fraction: float = 0.1,
    temperature: float = 0.07,
    epsilon: float = 0.1,
    popularity: float | None = None,
) -> QualityWorld:
    """Simulate a log on the training examples; the test examples are the evaluation contexts.

    The logging policy is (1 - epsilon) softmax(score / temperature) + epsilon / N. The scores are
    those of a ridge regression on a `fraction` of the training examples with all their labels. With
    `popularity` the softmax is rank^-popularity instead, with the labels in random order, in every
    context.
    """
    rng = np.random.default_rng([seed, 9])
    count, number = labels.train_labels.shape
    known = rng.permutation(count)[: max(2, int(fraction * count))]
    weak = _ridge(labels.train_features[known], labels.train_labels[known])
    if popularity is not None:
        weak = _popular(rng.permutation(number), popularity * temperature)
    example = rng.integers(0, count, rounds)
    action = np.empty(rounds, dtype=np.int64)
    pscore = np.empty(rounds)
    for start in range(0, count, 1000):
        # Group rounds by example, so that probabilities are computed once per example.
        stop = min(start + 1000, count)
        pi = _logging(weak(labels.train_features[start:stop]), temperature, epsilon)
        here = np.flatnonzero((example >= start) & (example < stop))
        chosen = pi[example[here] - start]
        uniform = rng.random(len(here))[:, None]
        action[here] = (chosen.cumsum(axis=1) < uniform).sum(axis=1).clip(max=number - 1)
        pscore[here] = chosen[np.arange(len(here)), action[here]]
    reward = np.asarray(labels.train_labels[example, action]).ravel().astype(np.float64)
    context = _columns(labels, labels.train_features[example])
    columns = {
        **context,
        "action": pa.array(action),
        "reward": pa.array(reward),
        "pscore": pa.array(pscore),
    }
    spec = (
        FeatureSpec(name="tokens", kind="bag")
        if labels.as_tokens
        else FeatureSpec(name="features", kind="vector")
    )
    items = pa.table({"item_id": pa.array(np.arange(number))})
    catalogue_schema = CatalogueSchema(
        item_id="item_id",
        features=(FeatureSpec(name="id", kind="category", column="item_id"),),
    )

    def expected(start: int, stop: int) -> Tensor:
        return torch.from_numpy(labels.test_labels[start:stop].toarray()).double()

    return QualityWorld(
        name=f"{labels.name}, n {rounds}",
        log=TableLog(pa.table(columns), LogSchema(context=(spec,), pscore="pscore")),
        catalogue=Catalogue.from_table(items, catalogue_schema),
        truth=Truth(pa.table(_columns(labels, labels.test_features)), expected),
        baselines=_baselines(labels, weak, temperature, epsilon),
    )


def _baselines(
    labels: LabelSet, weak: Callable[..., Array], temperature: float, epsilon: float
) -> dict[str, float]:
    full = _ridge(labels.train_features, labels.train_labels)
    logging = supervised = 0.0
    total = labels.test_labels.shape[0]
    for start in range(0, total, 1000):
        x, y = labels.test_features[start : start + 1000], labels.test_labels[start : start + 1000]
        truth = y.toarray()
        logging += float((_logging(weak(x), temperature, epsilon) * truth).sum())
        supervised += float(truth[np.arange(len(truth)), full(x).argmax(axis=1)].sum())
    return {
        "logging": logging / total,
        "best_fixed": float(labels.test_labels.mean(axis=0).max()),
        "supervised": supervised / total,
        "optimum": float((labels.test_labels.max(axis=1).toarray()).mean()),
    }


def _ridge(
    features: sparse.csr_matrix, targets: sparse.csr_matrix, penalty: float = 30.0
) -> Callable[[sparse.csr_matrix], Array]:
    """Fit a ridge regression on rows of norm 8 with an intercept, in its primal or dual form."""

    def design(x: sparse.csr_matrix) -> Array:
        dense = x.toarray()
        length = np.linalg.norm(dense, axis=1, keepdims=True)
        dense = 8.0 * dense / np.maximum(length, 1e-9)
        result: Array = np.concatenate([dense, np.ones((len(dense), 1), np.float32)], axis=1)
        return result

    x = design(features).astype(np.float64)
    if len(x) < x.shape[1]:
        dual = np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), targets.toarray())
        weight = x.T @ dual
    else:
        gram = x.T @ x + penalty * np.eye(x.shape[1])
        weight = np.linalg.solve(gram, x.T @ targets.toarray())
    single: Array = weight.astype(np.float32)

    def predict(rows: sparse.csr_matrix) -> Array:
        scores: Array = design(rows) @ single
        return scores

    return predict


def _popular(order: NDArray[np.int64], power: float) -> Callable[[sparse.csr_matrix], Array]:
    """Scores -power log(rank), equal in all contexts."""
    score = (-power * np.log1p(order)).astype(np.float32)

    def predict(rows: sparse.csr_matrix) -> Array:
        return np.broadcast_to(score, (rows.shape[0], len(score)))

    return predict


def _logging(score: Array, temperature: float, epsilon: float) -> NDArray[np.float64]:
    scaled = score.astype(np.float64) / temperature
    weight = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    pi: NDArray[np.float64] = weight / weight.sum(axis=1, keepdims=True)
    pi = (1.0 - epsilon) * pi + epsilon / pi.shape[1]
    return pi


def _columns(labels: LabelSet, rows: sparse.csr_matrix) -> dict[str, pa.Array]:
    if not labels.as_tokens:
        return {"features": vector_array(rows.toarray())}
    offsets, tokens = pa.array(rows.indptr.astype(np.int32)), pa.array(rows.indices)
    return {"tokens": pa.ListArray.from_arrays(offsets, tokens)}


def label_sets(prefix: str | None, with_long_tail: bool, seed: int) -> list[LabelSet]:
    """Return the label set stored at `prefix`, if given, and optionally the simulated one."""
    stored = [] if prefix is None else [load_label_set(prefix)]
    return [*stored, *([long_tail(seed)] if with_long_tail else [])]
