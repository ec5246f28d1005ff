"""Time, memory and accuracy of an evaluation with estimator selection on a large log.

A simulated recommender with known expected rewards logs `--rows` rows over `--items` items by
popularity and exploration. A two-tower policy and a two-tower reward model (both of width `--dim`)
are trained on another log, and the policy is evaluated as by `offtower evaluate --select all`:

    python benchmarks/evaluation_scale.py --rows 1000000 --items 100000
    python benchmarks/evaluation_scale.py --rows 1000000 --items 1000000 --draws 2 --batch 16384

With --draws, the expected reward of every reward model is a mean over items drawn from the policy.
Without it, that of the two towers is a sum over the catalogue, and only linear and tree models use
draws. The evaluation runs in its own process for the memory measurement. `--one-context` compares
estimates with the closed form for one context, q(a) = a / (A - 1), pi_b ~ 1 / (a + 1) and
pi_e ~ exp(3 q). `--pasif` ranks estimators by PAS-IF from 100 draws per context.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.simulate import LoggingPolicy, SimulatedWorld, WorldSettings
from offtower.evaluation import EvaluationRows, estimators
from offtower.evaluation.run import evaluate_runs
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.training.run import train_run


def world(args: argparse.Namespace) -> SimulatedWorld:
    logging = LoggingPolicy("popularity", epsilon=0.5)
    return SimulatedWorld(args.items, WorldSettings(8, 8, 8, intercept=-1.0), logging=logging)


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write the catalogue, the training and the test log, and train a run."""
    simulated = world(args)
    schema = simulated.catalogue_schema
    write_catalogue(folder / "catalogue", simulated.catalogue_table(), schema)
    train = min(args.rows, 200_000)
    write_log(folder / "train", simulated.log(train, seed=1), simulated.log_schema)
    write_log(folder / "test", simulated.log(args.rows, seed=2), simulated.log_schema)
    tower = {"hidden_layer_sizes": [32]}
    train_run(
        parse_config(
            {
                "name": "run",
                "runs": str(folder),
                "data": {
                    "train": str(folder / "train"),
                    "test": str(folder / "test"),
                    "catalogue": str(folder / "catalogue"),
                },
                "policy": {
                    "embedding_dim": args.dim,
                    "temperature": args.temperature,
                    "context_tower": tower,
                    "item_tower": tower,
                },
                "reward_model": {
                    "kind": "factored",
                    "embedding_dim": args.dim,
                    "folds": 1,
                    "epochs": 3,
                    "tower": tower,
                },
                "objective": {"name": "regression"},
                "training": {"epochs": 3, "measure_terms": False},
                "evaluation": {"batch_rows": args.batch},
            }
        )
    )


def evaluate(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one evaluation with selection and return its figures, seconds and peak memory."""
    overrides = []
    if args.draws:
        overrides = ["evaluation.expected_reward=draws", f"evaluation.draws={args.draws}"]
    else:
        overrides = ["evaluation.draws=2"]
    overrides.append(f"evaluation.batch_rows={args.batch}")
    started = time.perf_counter()
    found = evaluate_runs(
        [folder / "run"], overrides=overrides, select="all" if args.select else None
    )
    seconds = time.perf_counter() - started
    policy = found.result.policies["run"]
    out: dict[str, Any] = {
        "seconds": seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "estimates": {name: e.to_dict() for name, e in policy.estimates.items()},
        "effective_rows": policy.weights.effective_sample_size,
        "verdict": policy.verdict.decision,
        "notes": found.notes,
    }
    if args.select:
        chosen = found.selection["run"]
        out["choices"] = {name: r.best.name for name, r in chosen.results.items()}
        out["value"] = chosen.best.value
        scores = chosen.results[chosen.recommended].ranking
        out["candidates"] = {score.name: score.value for score in scores}
    return out


def truth(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return the policy's true value, a mean over new contexts."""
    from offtower.data.catalogue import Catalogue
    from offtower.data.encoding import to_tensors
    from offtower.evaluation.run_loading import open_run

    simulated = world(args)
    run = open_run(folder / "run", Catalogue.open(folder / "catalogue"))
    policy: TwoTowerPolicy = run.policy
    items: ItemFeatures = run.items
    with torch.no_grad():
        embedded = policy.embed_items(items)

    def contexts(table: Any) -> torch.Tensor:
        return policy.embed_contexts(to_tensors(policy.context_encoding.encode(table)))

    value = simulated.true_value(
        contexts,
        embedded.embedding,
        temperature=policy.temperature,
        item_bias=embedded.bias,
        n_contexts=args.truth_contexts,
        seed=7,
    )
    return {"value": value.value, "std_error": value.std_error}


def one_context(args: argparse.Namespace) -> dict[str, Any]:
    """Compare each estimate with its closed form; expected rewards are means over draws."""
    rng = np.random.default_rng(0)
    action = np.arange(args.items)
    q = action / (args.items - 1)
    behavior = 1.0 / (action + 1.0)
    behavior /= behavior.sum()
    target = np.exp(3.0 * q)
    target /= target.sum()
    model = 0.15 + 0.6 * q**2
    started = time.perf_counter()
    ends, aims = np.cumsum(behavior), np.cumsum(target)
    last = args.items - 1
    logged = np.minimum(np.searchsorted(ends, rng.random(args.rows)), last)
    reward = (rng.random(args.rows) < q[logged]) * 1.0
    drawn = np.minimum(np.searchsorted(aims, rng.random((args.rows, max(args.draws, 1)))), last)
    rows = EvaluationRows(
        target[logged] / behavior[logged], reward, model[logged], model[drawn].mean(axis=1)
    )
    out: dict[str, Any] = {"value": float(target @ q), "dm_value": float(target @ model)}
    for estimator in (
        estimators.IPS(),
        estimators.SNIPS(),
        estimators.DM(),
        estimators.DR(),
        estimators.SNDR(),
    ):
        found = estimator.estimate(rows)
        exact = out["dm_value"] if estimator.label == "dm" else out["value"]
        out[estimator.label] = {
            **found.to_dict(),
            "z": (found.value - exact) / found.std_error,
        }
    out["seconds"] = time.perf_counter() - started
    return out


def pasif(args: argparse.Namespace) -> dict[str, Any]:
    """Run PAS-IF with 100 draws per context, for catalogues too large for rounds x items arrays."""
    from offtower.evaluation.selection import (
        SelectionLog,
        default_candidates,
        select_estimator,
    )
    from offtower.evaluation.selection.exact import fit_draws

    rng = np.random.default_rng(0)
    n, draws, dim = args.rows, 100, args.dim
    items = torch.from_numpy(rng.normal(size=(args.items, dim)) / np.sqrt(dim)).float()
    context = torch.from_numpy(rng.normal(size=(n, dim))).float()
    behavior_ends = np.cumsum(np.full(args.items, 1.0 / args.items))
    started = time.perf_counter()
    drawn = torch.from_numpy(
        np.minimum(np.searchsorted(behavior_ends, rng.random((n, draws + 1))), args.items - 1)
    )
    from offtower import ops

    logged = drawn[:, 0]
    terms = ops.policy_terms(
        context,
        items,
        logged,
        reward_model=ops.FactoredReward(context, items, link="sigmoid"),
    )
    logit = torch.einsum("nd,nsd->ns", context, items[drawn])
    weight = torch.exp(logit - terms.log_normalizer[:, None] + np.log(args.items)).double().numpy()
    q = torch.sigmoid(logit).double().numpy()
    reward = (rng.random(n) < q[:, 0]) * 1.0
    assert terms.expected_reward is not None
    expected = terms.expected_reward.double().numpy()
    log = SelectionLog.from_draws(
        weight[:, 0], reward, weight[:, 1:], {"true": (q[:, 0], expected, q[:, 1:])}
    )
    fit_started = time.perf_counter()
    rho, at_draws = fit_draws(weight[:, 0], weight[:, 1:], 0.2)
    fit_seconds = time.perf_counter() - fit_started
    result = select_estimator(log, default_candidates(log.problem), method="pasif")
    return {
        "seconds": time.perf_counter() - started,
        "fit_seconds": fit_seconds,
        "mean_share": float(at_draws.mean()),
        "mean_rho": float(rho.mean()),
        "best": result.best.name,
        "value": result.best.value,
        "true_value": float(expected.mean()),
    }


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the evaluation in its own process, so that peak memory is its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--evaluate", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--draws", type=int, default=0)
    parser.add_argument("--truth-contexts", type=int, default=1000)
    parser.add_argument("--no-selection", dest="select", action="store_false")
    parser.add_argument("--one-context", action="store_true")
    parser.add_argument("--pasif", action="store_true")
    parser.add_argument("--folder", help="keep the data here, and reuse it")
    parser.add_argument("--prepare", action="store_true", help="with --folder: write the data only")
    parser.add_argument("--evaluate", help=argparse.SUPPRESS)
    parser.add_argument("--json", help="write all numbers here ('-' for standard output)")
    args = parser.parse_args()
    if args.evaluate:
        print(json.dumps(evaluate(args, Path(args.evaluate))))
        return
    if args.one_context or args.pasif:
        report = one_context(args) if args.one_context else pasif(args)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(args.folder or temporary)
            if not (folder / "run").exists():
                prepare(args, folder)
            if args.prepare:
                return
            report = measured(args, folder)
            report["truth"] = truth(args, folder) if args.truth_contexts else None
    report = {"settings": {k: v for k, v in vars(args).items() if k != "evaluate"}, **report}
    text = json.dumps(report, indent=1)
    if args.json and args.json != "-":
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
