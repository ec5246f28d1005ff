"""Regret of estimator selectors, with true errors from regenerated logs, as in the PAS-IF paper.

10 actions, contexts of 10 dimensions, binary rewards, two logging policies with inverse
temperatures -2 and 2 and 1,000 rounds each, targets with inverse temperatures -10, -5, 0, 5, 10.
The candidates' true mean squared errors come from `--truth` regenerated logs, with the reward
models refitted on each. For each selector and each constant choice the relative regret,
mse(choice) / mse(best) - 1, and the rank correlation of its ranking are reported, with standard
errors over repetitions (the first `--repetitions` of those logs).

    python benchmarks/estimator_selection.py --worlds 100 101 102 --repetitions 200 --truth 1000
    python benchmarks/estimator_selection.py --selectors ablation --repetitions 100

Worlds 0 to 39, 104, 105 and 200 to 211 were used while the selectors were designed; report others.
To split a long run, repeat the command with --resume DIR --minutes 4.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from offtower.evaluation import estimators as e
from offtower.evaluation.selection import (
    Candidate,
    NetworkOptions,
    SelectionLog,
    select_estimator,
)

Array = NDArray[np.float64]
TARGETS = (-10.0, -5.0, 0.0, 5.0, 10.0)


@dataclass(frozen=True)
class World:
    """q(x, a) = sigmoid(<x, theta_a> + c_a), theta and c in [0, 1]; policies softmax(beta q)."""

    seed: int
    n_actions: int = 10
    dim: int = 10
    rounds: int = 1000
    logging: tuple[float, float] = (-2.0, 2.0)

    def expected_reward(self, context: Array) -> Array:
        """Return the (n, A) expected rewards of all actions."""
        rng = np.random.default_rng([7, self.seed])
        theta = rng.uniform(size=(self.n_actions, self.dim))
        shift = rng.uniform(size=self.n_actions)
        return 1.0 / (1.0 + np.exp(-(context @ theta.T + shift)))

    def truth(self, beta: float, contexts: int = 400_000) -> float:
        """Return the target policy's value, a mean over contexts that are in no log."""
        q = self.expected_reward(
            np.random.default_rng([5, self.seed]).normal(size=(contexts, self.dim))
        )
        return float((policy(q, beta) * q).sum(axis=1).mean())

    def log(self, number: int) -> dict[str, Any]:
        """Draw log `number` of this world and fit its reward models."""
        rng = np.random.default_rng([11, self.seed, number])
        n = 2 * self.rounds
        context = rng.normal(size=(n, self.dim))
        q = self.expected_reward(context)
        both = np.stack([policy(q, beta) for beta in self.logging])
        row_policy = np.repeat([0, 1], self.rounds)
        own = both[row_policy, np.arange(n)]
        action = (own.cumsum(axis=1) < rng.uniform(size=(n, 1))).sum(axis=1)
        action = np.minimum(action, self.n_actions - 1)
        reward = (rng.uniform(size=n) < q[np.arange(n), action]).astype(np.float64)
        return {
            "context": context,
            "q": q,
            "policies": both,
            "row_policy": row_policy,
            "behavior": both.mean(axis=0),
            "action": action,
            "reward": reward,
            "models": fit_reward_models(context, action, reward, self.n_actions, number),
        }


def policy(q: Array, beta: float) -> Array:
    """Return softmax(beta q) over actions."""
    z = np.exp(beta * q - (beta * q).max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


def fit_reward_models(
    context: Array,
    action: NDArray[np.int64],
    reward: Array,
    n_actions: int,
    seed: int,
    folds: int = 3,
) -> dict[str, Array]:
    """Return cross-fitted (n, A) predictions of two models on [context, one-hot item]."""
    n = action.shape[0]
    fold = np.random.default_rng([13, seed]).permutation(n) % folds
    out = {"linear": np.empty((n, n_actions)), "forest": np.empty((n, n_actions))}
    one_hot = np.eye(n_actions)
    for k in range(folds):
        train, test = fold != k, fold == k
        inputs = np.hstack([context[train], one_hot[action[train]]])
        every = np.hstack(
            [np.repeat(context[test], n_actions, axis=0), np.tile(one_hot, (test.sum(), 1))]
        )
        models = {
            "linear": LogisticRegression(C=100.0, max_iter=200),
            "forest": RandomForestClassifier(
                n_estimators=20, max_depth=6, min_samples_leaf=10, random_state=0
            ),
        }
        for name, model in models.items():
            model.fit(inputs, reward[train])
            out[name][test] = model.predict_proba(every)[:, 1].reshape(-1, n_actions)
    return out


def candidates() -> list[Candidate]:
    """Return 14 candidates: two without a model, six with each of the two reward models."""
    out = [Candidate("IPS", e.IPS()), Candidate("SNIPS", e.SNIPS())]
    for model in ("linear", "forest"):
        for name, estimator in (
            ("DM", e.DM()),
            ("DR", e.DR()),
            ("SNDR", e.SNDR()),
            ("SwitchDR", e.SwitchDR(threshold=2.0)),
            ("DRos", e.DRos(shrinkage=10.0)),
            ("SubGaussianDR", e.SubGaussianDR(lambda_=0.1)),
        ):
            out.append(Candidate(f"{name}[{model}]", estimator, model))
    return out


@dataclass(frozen=True)
class Selector:
    method: str
    options: dict[str, Any] = field(default_factory=dict)


def selectors(which: str, network: NetworkOptions) -> dict[str, Selector]:
    """Return the selectors of one of three sets: main, network or ablation."""
    main = {
        "paired": Selector("paired"),
        "paired, no overlap penalty": Selector("paired", {"overlap": 0.0}),
        "pasif exact, 10 splits": Selector("pasif", {"repetitions": 10, "ties": "none"}),
        "pasif exact, 100 splits": Selector("pasif", {"ties": "none"}),
        "pasif exact, ties by pairing": Selector("pasif"),
        "heuristic": Selector("heuristic"),
        "ocv": Selector("ocv"),
        "slope": Selector("slope"),
    }
    if which == "main":
        return main
    if which == "network":
        options = {"network": network, "ties": "none"}
        return {
            "pasif network, 10 splits": Selector("pasif", {"repetitions": 10, **options}),
            "pasif exact, 10 splits": main["pasif exact, 10 splits"],
            "pasif exact, 100 splits": main["pasif exact, 100 splits"],
            "paired": main["paired"],
        }
    plain: dict[str, Any] = {"repetitions": 40, "ties": "none"}
    pasif = {
        f"pasif, {r} splits": Selector("pasif", {**plain, "repetitions": r}) for r in (10, 40, 160)
    }
    pasif |= {
        f"pasif, 40 splits, k = {k}": Selector("pasif", {**plain, "share": k})
        for k in (0.1, 0.3, 0.5)
    }
    pasif |= {
        "pasif, 40 splits, bootstrap": Selector("pasif", {**plain, "resample": True}),
        "pasif, 40 splits, ties by pairing": Selector("pasif", {**plain, "ties": "paired"}),
    }
    paired = {
        "paired, no caution, no prior": Selector("paired", {"caution": 0.0, "tie_width": 0.0}),
        "paired, caution only": Selector("paired", {"tie_width": 0.0}),
        "paired, prior only": Selector("paired", {"caution": 0.0}),
        "paired, no overlap penalty": Selector("paired", {"overlap": 0.0}),
        "paired": Selector("paired"),
    }
    return {**pasif, **paired}


@dataclass(frozen=True)
class Store:
    """Finished rankings in a folder, so that an interrupted run can resume.

    deadline: time.time() after which no new ranking is started.
    """

    folder: str
    deadline: float = math.inf

    def get(self, key: str) -> tuple[list[Any], float] | None:
        """Return a stored ranking (or estimates) and its seconds; exit after the deadline."""
        path = os.path.join(self.folder, key + ".json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            return content["order"], content["seconds"]
        if time.time() > self.deadline:
            raise SystemExit("stopped at the time limit; run the same command to resume")
        return None

    def put(self, key: str, order: list[Any], seconds: float) -> None:
        path = os.path.join(self.folder, key + ".json")
        os.makedirs(self.folder, exist_ok=True)
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump({"order": order, "seconds": seconds}, file)
        os.replace(path + ".part", path)


def run_log(task: tuple[World, int, dict[str, Selector], Store | None]) -> dict[str, Any]:
    """Return every candidate's estimate and every selector's ranking per target on one log."""
    world, number, chosen, store = task
    pool = candidates()
    names = [c.name for c in pool]
    truth_key = f"estimates-{world.seed}-{number}"
    if store is not None and not chosen:
        found = store.get(truth_key)
        if found is not None:
            return {"estimates": np.array(found[0]), "orders": {}, "seconds": {}}
    data = world.log(number)
    estimates = np.empty((len(TARGETS), len(pool)))
    orders: dict[str, list[list[int]]] = {name: [] for name in chosen}
    seconds: dict[str, float] = dict.fromkeys(chosen, 0.0)
    for t, beta in enumerate(TARGETS):
        log = SelectionLog.from_policies(
            data["action"],
            data["reward"],
            data["behavior"],
            policy(data["q"], beta),
            data["models"],
            context=data["context"],
            item_features=np.eye(world.n_actions),
            row_policy=data["row_policy"],
            policies=data["policies"],
            model_parameters={"linear": world.dim + world.n_actions},
        )
        estimates[t] = log.problem.values(pool)
        for name, selector in chosen.items():
            key = f"{world.seed}-{number}-{beta:g}-{name.replace(' ', '_')}"
            stored = None if store is None else store.get(key)
            if stored is None:
                started = time.perf_counter()
                result = select_estimator(
                    log,
                    pool,
                    method=selector.method,
                    **({} if selector.method in ("paired", "slope") else {"seed": number}),
                    **selector.options,
                )
                order = [names.index(s.name) for s in result.ranking]
                stored = order, time.perf_counter() - started
                if store is not None:
                    store.put(key, *stored)
            seconds[name] += stored[1] / len(TARGETS)
            orders[name].append(stored[0])
    if store is not None and not chosen:
        store.put(truth_key, estimates.tolist(), 0.0)
    return {"estimates": estimates, "orders": orders, "seconds": seconds}


def summarize(
    mse: Array, orders: dict[str, NDArray[np.int64]], truth_errors: Array
) -> dict[str, dict[str, Any]]:
    """Return mean and standard error of regret and rank correlation over repetitions, by selector.

    mse: (targets, candidates). orders: (repetitions, targets, candidates). truth_errors: (logs,
    targets, candidates), resampled to include the uncertainty of the true errors.
    """
    best = mse.min(axis=1)
    constant = (mse / best[:, None] - 1.0).mean(axis=0)
    best_constant = int(np.argmin(constant))
    rng = np.random.default_rng(0)
    out = {}
    for name, order in orders.items():
        pick = order[:, :, 0]
        regret = np.take_along_axis(mse[None], pick[:, :, None], axis=2)[:, :, 0] / best - 1.0
        ranks = np.argsort(order, axis=2)
        correlation = np.array(
            [[spearmanr(row[t], mse[t])[0] for t in range(mse.shape[0])] for row in ranks]
        )
        reps = regret.shape[0]
        # Bootstrap of the difference to the best constant over logs (true errors) and repetitions.
        differences = []
        for _ in range(200):
            truth = np.mean(
                truth_errors[rng.integers(0, len(truth_errors), len(truth_errors))] ** 2, axis=0
            )
            rows = rng.integers(0, reps, reps)
            picked = np.take_along_axis(truth[None], pick[rows][:, :, None], axis=2)[:, :, 0]
            differences.append(np.mean((picked - truth[:, best_constant]) / truth.min(axis=1)))
        out[name] = {
            "regret": regret.mean(axis=0).tolist(),
            "regret_se": (regret.std(axis=0, ddof=1) / np.sqrt(reps)).tolist(),
            "mean_regret": float(regret.mean()),
            "mean_regret_se": float(regret.mean(axis=1).std(ddof=1) / np.sqrt(reps)),
            "rank_correlation": correlation.mean(axis=0).tolist(),
            "rank_correlation_se": (correlation.std(axis=0, ddof=1) / np.sqrt(reps)).tolist(),
            "minus_best_constant": float(regret.mean() - constant[best_constant]),
            "minus_best_constant_se": float(np.std(differences)),
        }
    return out


def run_world(world: World, args: argparse.Namespace, map_: Callable[..., Any]) -> dict[str, Any]:
    """Return true values and the figures of all selectors and constants on one world."""
    network = NetworkOptions(
        epochs=args.network_epochs,
        learning_rate=args.network_rate,
    )
    chosen = selectors(args.selectors, network)
    logs = max(args.truth, args.repetitions)
    tasks = [(world, i, chosen if i < args.repetitions else {}, args.store) for i in range(logs)]
    results = list(map_(run_log, tasks))
    truth = np.array([world.truth(beta) for beta in TARGETS])
    errors = np.array([r["estimates"] for r in results]) - truth[None, :, None]
    mse = np.mean(errors**2, axis=0)
    repetitions = results[: args.repetitions]
    orders = {name: np.array([r["orders"][name] for r in repetitions]) for name in chosen}
    seconds = {name: np.mean([r["seconds"][name] for r in repetitions]) for name in chosen}
    names = [c.name for c in candidates()]
    relative = mse / mse.min(axis=1, keepdims=True) - 1.0
    return {
        "world": world.seed,
        "truth": truth.tolist(),
        "constant": {
            name: {"regret": relative[:, j].tolist(), "mean_regret": float(relative[:, j].mean())}
            for j, name in enumerate(names)
        },
        "selectors": summarize(mse, orders, errors),
        "seconds": {name: float(mean) for name, mean in seconds.items()},
        "chosen": {
            name: {
                str(beta): {
                    names[j]: int(c)
                    for j, c in enumerate(np.bincount(order[:, t, 0], minlength=len(names)))
                    if c
                }
                for t, beta in enumerate(TARGETS)
            }
            for name, order in orders.items()
        },
    }


def combine(worlds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over worlds; standard errors over repetitions are combined."""
    count = len(worlds)
    out: dict[str, Any] = {"selectors": {}, "constant": {}}
    for name in worlds[0]["selectors"]:
        parts = [w["selectors"][name] for w in worlds]
        out["selectors"][name] = {
            key: np.mean([p[key] for p in parts], axis=0).tolist()
            for key in ("regret", "rank_correlation", "mean_regret", "minus_best_constant")
        }
        for key in ("regret_se", "rank_correlation_se", "mean_regret_se", "minus_best_constant_se"):
            squares = np.square([p[key] for p in parts])
            out["selectors"][name][key] = (np.sqrt(squares.sum(axis=0)) / count).tolist()
        out["selectors"][name]["seconds"] = float(np.mean([w["seconds"][name] for w in worlds]))
    for name in worlds[0]["constant"]:
        out["constant"][name] = {
            "regret": np.mean([w["constant"][name]["regret"] for w in worlds], axis=0).tolist(),
            "mean_regret": float(np.mean([w["constant"][name]["mean_regret"] for w in worlds])),
        }
    return out


def print_table(total: dict[str, Any]) -> None:
    """Print a table of the selectors, then of the best constants."""
    head = "".join(f"{beta:>14g}" for beta in TARGETS)
    print(f"{'relative regret':38s}{head}{'mean':>16s}{'- constant':>18s}{'s/policy':>10s}")
    for name, row in total["selectors"].items():
        cells = "".join(
            f"{m:8.3f} ±{s:.3f}" for m, s in zip(row["regret"], row["regret_se"], strict=True)
        )
        print(
            f"{name:38s}{cells}{row['mean_regret']:9.3f} ±{row['mean_regret_se']:.3f}"
            f"{row['minus_best_constant']:11.3f} ±{row['minus_best_constant_se']:.3f}"
            f"{row['seconds']:10.3f}"
        )
    ranked = sorted(total["constant"].items(), key=lambda kv: kv[1]["mean_regret"])
    for name, row in ranked[:6]:
        cells = "".join(f"{m:14.3f}" for m in row["regret"])
        print(f"always {name:31s}{cells}{row['mean_regret']:9.3f}")
    print("\nrank correlation")
    for name, row in total["selectors"].items():
        cells = "".join(
            f"{m:8.2f} ±{s:.2f} "
            for m, s in zip(row["rank_correlation"], row["rank_correlation_se"], strict=True)
        )
        print(f"{name:38s}{cells}")


def plot(total: dict[str, Any], path: str) -> None:
    """Plot the mean relative regret of selectors and the best constants on a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(n, r["mean_regret"], r["mean_regret_se"]) for n, r in total["selectors"].items()]
    constants = sorted(total["constant"].items(), key=lambda kv: kv[1]["mean_regret"])[:4]
    rows += [(f"always {n}", r["mean_regret"], 0.0) for n, r in constants]
    figure, axis = plt.subplots(figsize=(7, 0.4 * len(rows) + 1.2))
    position = np.arange(len(rows))[::-1]
    axis.errorbar(
        [max(r[1], 1e-4) for r in rows],
        position,
        xerr=[2 * r[2] for r in rows],
        fmt="o",
        color="black",
    )
    axis.axvline(0.05, linestyle="--", color="gray", linewidth=1)
    axis.set_xscale("log")
    axis.set_yticks(position, [r[0] for r in rows])
    axis.set_xlabel("mean relative regret over five targets (bars: two standard errors)")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run, print, and write JSON and a figure on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[100])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--truth", type=int, default=1000, help="regenerated logs for the true MSE")
    parser.add_argument("--rounds", type=int, default=1000, help="rounds of each logging policy")
    parser.add_argument("--logging", type=float, nargs=2, default=[-2.0, 2.0])
    parser.add_argument("--selectors", choices=("main", "ablation", "network"), default="main")
    parser.add_argument("--network-epochs", type=int, default=5000, help="published: 5000")
    parser.add_argument("--network-rate", type=float, default=1e-3, help="published: 0.001")
    parser.add_argument("--resume", help="folder of finished rankings; go on where a run stopped")
    parser.add_argument("--minutes", type=float, help="with --resume: stop after so long")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", help="write all numbers here ('-' for standard output)")
    parser.add_argument("--figure", help="write the figure here (.png, .svg, .pdf)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    late = math.inf if args.minutes is None else time.time() + 60 * args.minutes
    args.store = Store(args.resume, late) if args.resume else None
    results = []
    for seed in args.worlds:
        world = World(seed, rounds=args.rounds, logging=(args.logging[0], args.logging[1]))
        started = time.perf_counter()
        if args.workers > 1:
            with ProcessPoolExecutor(args.workers) as pool:
                results.append(run_world(world, args, pool.map))
        else:
            results.append(run_world(world, args, map))
        print(f"world {seed}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    total = combine(results)
    print_table(total)
    settings = {name: value for name, value in vars(args).items() if name != "store"}
    report = {"settings": settings, "total": total, "worlds": results}
    if args.json == "-":
        print(json.dumps(report))
    elif args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    if args.figure:
        plot(total, args.figure)


if __name__ == "__main__":
    main()
