"""Estimator selectors on classification data as bandits, as in cross-validated evaluation.

The protocol is that of Cief, Kveton and Kompan ("Cross-Validated Off-Policy Evaluation", 2024;
repository navarog/cross-validated-ope, configs/tuning.yaml). Half of a set fits the policies, each
a softmax of temperature x the class probabilities of a logistic regression on a resample. The other
half is logged once. Logging temperatures 3, 1, 0, -1, -3 and target temperatures 10 and -10 give
ten settings a set. The reward is 1 for the right class.

    python benchmarks/cross_validated_ope.py --repetitions 5 --json out.json
    python benchmarks/cross_validated_ope.py --data FOLDER --sets letter satimage

Without --data, sets are those inside scikit-learn; its digits are the test part of optdigits.
With it, FOLDER/NAME.dat has commas between numbers and the class in the last column. Differences to
the paper: reward models are one ridge regression per class, fitted in three folds of the log, and
the candidates are those of `CANDIDATES`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import datasets
from sklearn.linear_model import LogisticRegression

from offtower.evaluation import estimators as e
from offtower.evaluation.selection import Candidate, SelectionLog, select_estimator

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

LOGGING, TARGET = (3.0, 1.0, 0.0, -1.0, -3.0), (10.0, -10.0)
SELECTORS = ("paired", "ocv", "slope", "pasif")
MODEL, FOLDS, RIDGE = "ridge", 3, 3.0
CANDIDATES = (
    Candidate("ips", e.IPS()),
    Candidate("snips", e.SNIPS()),
    Candidate("dm", e.DM(), MODEL),
    Candidate("dr", e.DR(), MODEL),
    Candidate("sndr", e.SNDR(), MODEL),
    *(Candidate(f"clipped_ips_{c:g}", e.ClippedIPS(c)) for c in (2.0, 5.0, 20.0)),
    *(Candidate(f"sub_gaussian_ips_{c:g}", e.SubGaussianIPS(c)) for c in (0.01, 0.1, 0.5)),
    *(Candidate(f"switch_dr_{c:g}", e.SwitchDR(c), MODEL) for c in (2.0, 5.0, 20.0)),
    *(Candidate(f"dros_{c:g}", e.DRos(c), MODEL) for c in (1.0, 10.0, 100.0)),
)


def load(name: str, folder: Path | None) -> tuple[Array, IntArray]:
    """Standardized features with a constant, and classes from 0."""
    if folder is None:
        x, label = getattr(datasets, f"load_{name}")(return_X_y=True)
    else:
        table = np.genfromtxt(folder / f"{name}.dat", delimiter=",", dtype=str)
        x, label = table[:, :-1].astype(np.float64), np.char.strip(table[:, -1])
    _, y = np.unique(label, return_inverse=True)
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-9)
    return np.column_stack([np.ones(len(x)), x]), y.astype(np.int64)


def probabilities(x: Array, y: IntArray, at: Array, rng: np.random.Generator) -> Array:
    """Class probabilities at `at` of a logistic regression on a resample of (x, y)."""
    drawn = rng.integers(0, len(x), len(x))
    count = int(y.max()) + 1
    # Every class occurs, as in the paper, by one row of zeros.
    known = np.concatenate([np.zeros((count, x.shape[1])), x[drawn]])
    label = np.concatenate([np.arange(count), y[drawn]])
    return np.asarray(LogisticRegression(max_iter=1000).fit(known, label).predict_proba(at))


def softmax(logit: Array) -> Array:
    weight = np.exp(logit - logit.max(axis=1, keepdims=True))
    return np.asarray(weight / weight.sum(axis=1, keepdims=True))


def cross_fitted(x: Array, action: IntArray, reward: Array, count: int, fold: IntArray) -> Array:
    """(n, A) predictions of one ridge regression per class, each row's from the other folds."""
    out, penalty = np.empty((len(x), count)), RIDGE * np.eye(x.shape[1])
    for k in range(FOLDS):
        for a in range(count):
            rows = (action == a) & (fold != k)
            beta = np.linalg.solve(x[rows].T @ x[rows] + penalty, x[rows].T @ reward[rows])
            out[fold == k, a] = x[fold == k] @ beta
    return np.clip(out, 0.0, 1.0)


def errors(x: Array, y: IntArray, seed: int, selectors: Sequence[str]) -> dict[str, list[float]]:
    """Squared errors by selector and by constant choice, over the ten settings."""
    rng = np.random.default_rng(seed)
    order, count = rng.permutation(len(x)), int(y.max()) + 1
    half = len(x) // 2
    fitted, logged = order[:half], order[half:]
    x_log, y_log = x[logged], y[logged]
    behaviors, targets = (probabilities(x[fitted], y[fitted], x_log, rng) for _ in range(2))
    every, found = np.arange(len(x_log)), defaultdict[str, list[float]](list)
    for target_temperature in TARGET:
        target = softmax(target_temperature * targets)
        truth = float(target[every, y_log].mean())
        for temperature in LOGGING:
            behavior = softmax(temperature * behaviors)
            action = (behavior.cumsum(axis=1) > rng.random((len(x_log), 1))).argmax(axis=1)
            reward = (action == y_log).astype(np.float64)
            fold = rng.permutation(len(x_log)) % FOLDS
            predicted = cross_fitted(x_log, action, reward, count, fold)
            log = SelectionLog.from_policies(
                action,
                reward,
                behavior,
                target,
                {MODEL: predicted},
                context=x_log,
                item_features=np.eye(count),
                model_parameters={MODEL: x.shape[1] * count},
            )
            values = log.problem.values(list(CANDIDATES))
            for one, value in zip(CANDIDATES, values, strict=True):
                found[f"always {one.name}"].append(float(value - truth) ** 2)
            value_of = dict(zip([one.name for one in CANDIDATES], values, strict=True))
            for method in selectors:
                seeded = {"seed": seed} if method in ("ocv", "pasif") else {}
                best = select_estimator(log, CANDIDATES, method=method, **seeded).best.name
                found[method].append(float(value_of[best] - truth) ** 2)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=["digits", "wine", "breast_cancer", "iris"])
    parser.add_argument("--data", type=Path, help="folder of NAME.dat files")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--selectors", nargs="+", default=list(SELECTORS), choices=SELECTORS)
    parser.add_argument("--json", help="write all numbers here ('-' for standard output)")
    args = parser.parse_args(argv)
    report: dict[str, Any] = {"repetitions": args.repetitions, "settings_per_set": 10, "sets": {}}
    for name in args.sets:
        x, y = load(name, args.data)
        runs = [errors(x, y, seed, args.selectors) for seed in range(args.repetitions)]
        means = {key: np.array([np.mean(run[key]) for run in runs]) for key in runs[0]}
        best = min((k for k in means if k.startswith("always")), key=lambda k: means[k].mean())
        lines = {}
        for key in (*args.selectors, best):
            gap = means[key] - means[best]
            lines[key] = {
                "mse": float(means[key].mean()),
                "std_error": _error(means[key]),
                "minus_best_constant": float(gap.mean()),
                "std_error_of_difference": _error(gap),
            }
            print(
                f"{name:14s} {key:24s} mse {lines[key]['mse']:.2e} +- {_error(means[key]):.1e}, "
                f"minus the best constant {gap.mean():+.2e} +- {_error(gap):.1e}",
                file=sys.stderr,
                flush=True,
            )
        every = {key: float(value.mean()) for key, value in means.items()}
        report["sets"][name] = {"rows": len(x) - len(x) // 2, "results": lines, "mse": every}
    if args.json == "-":
        print(json.dumps(report))
    elif args.json:
        Path(args.json).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def _error(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else float("nan")


if __name__ == "__main__":
    main()
