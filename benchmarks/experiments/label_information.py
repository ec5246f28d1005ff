"""How much of a multi-label data set a log of bandit feedback contains, for any learner.

    python benchmarks/experiments/label_information.py --data PREFIX --long-tail --json labels.json

Reports the true values of greedy ridge regressions on test examples, with the best penalty for
each training set: all labels; as many random positive labels as the log reveals; all labels of as
many examples as contain that number of positives; the labels that the log reveals
(`revealed_labels`). For the labels that are rewarded in at least 1, 2, 5 and 10 contexts of the
log, also reports the value of the optimal policy and of the regression on all labels, both
restricted to these labels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, sparse

from offtower.benchmarks.quality.labels import LabelSet, as_feedback, label_sets
from offtower.benchmarks.quality.revealed import (
    PENALTIES,
    best_of_revealed,
    revealed,
    ridge_design,
)

Array = NDArray[np.float64]


def information(labels: LabelSet, rounds: int, seed: int) -> dict[str, float]:
    world = as_feedback(labels, rounds, seed)
    log = revealed(world)
    truth = labels.test_labels.toarray()
    positives = int(log.label.sum())
    everything = labels.train_labels.tocoo()
    rng = np.random.default_rng([seed, 12])
    drawn = rng.permutation(everything.nnz)[:positives]
    some = sparse.csr_matrix(
        (everything.data[drawn], (everything.row[drawn], everything.col[drawn])), everything.shape
    )
    examples = everything.shape[0]
    share = positives / everything.nnz
    whole = rng.permutation(examples)[: max(2, round(share * examples))]
    x, test = ridge_design(labels.train_features), ridge_design(labels.test_features)

    def ridge(rows: sparse.csr_matrix, *targets: sparse.csr_matrix) -> list[list[Array]]:
        """Return scores of the test examples by target and penalty."""
        gram = (rows.T @ rows).toarray()
        found: list[list[Array]] = [[] for _ in targets]
        for penalty in PENALTIES:
            factor = linalg.cho_factor(gram + penalty * np.eye(len(gram)))
            of_features = linalg.cho_solve(factor, test.T.toarray()).T
            for scores, target in zip(found, targets, strict=True):
                scores.append(of_features @ (rows.T @ target).toarray())
        return found

    def greedy(scores: Array) -> float:
        return float(truth[np.arange(len(truth)), scores.argmax(axis=1)].mean())

    full, random = ridge(x, labels.train_labels, some)
    (documents,) = ridge(x[whole], labels.train_labels[whole])
    result = {
        "logging": world.baselines["logging"],
        "positive labels": float(everything.nnz),
        "positive labels revealed": float(positives),
        "all labels": max(map(greedy, full)),
        "as many random positives": max(map(greedy, random)),
        "all labels of as many examples": max(map(greedy, documents)),
        "revealed labels": best_of_revealed(world)[0].greedy,
    }
    contexts = log.label.sum(axis=0)
    best = max(full, key=greedy)
    for least in (1, 2, 5, 10):
        there = contexts >= least
        name = f"labels rewarded in {least} contexts or more"
        result[name] = float(there.sum())
        result[f"{name}, all known"] = float((truth * there).max(axis=1).mean())
        result[f"{name}, regression of all labels"] = greedy(np.where(there, best, -np.inf))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a label set's files, PREFIX-train.npz and PREFIX-test.npz")
    parser.add_argument(
        "--long-tail", action="store_true", help="the simulated set of 3,000 labels"
    )
    parser.add_argument("--rounds", type=int, default=50_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    summary = {}
    for seed in range(arguments.seeds):
        for labels in label_sets(arguments.data, arguments.long_tail, seed):
            found = information(labels, arguments.rounds, seed)
            summary[f"{labels.name}, seed {seed}"] = found
            print(f"{labels.name}, seed {seed}")
            for name, value in found.items():
                print(f"  {name:<64}{value:10.4g}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
