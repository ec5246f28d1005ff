"""IPS, DR and regression with the settings of a plain training loop, on simulated logs.

The settings reproduce a plain training loop and are not recommended: 30-30-30 towers with ELU,
Adam with learning rate 0.005 and weight decay 1e-6, batches of 32 in the order of the log, 200
epochs, and a reward model that is not cross-fitted. Reported is the exact value of the softmax
policy on 5,000 held-out contexts.

    python benchmarks/experiments/plain_objectives.py --json plain_objectives.json

World: 10 actions, context and action vectors of dimension 5, standard normal; q(x, a) =
sigmoid(<c, x> + <d, a> + x'Ma) with coefficients uniform in [-1, 1]; logging policy softmax(q). Of
seeds 0 to 399, the five worlds are used whose values of the logging policy and of the optimum are
nearest to .609 and .956, those of a similar experiment. Each seed draws a world, a log and initial
weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offtower import TwoTowerPolicyLearner

SIMILAR = {"logging": 0.609, "optimum": 0.956, "ips": 0.766, "dr": 0.763, "regression": 0.887}
OBJECTIVES = ("regression", "ips", "dr")


class World:
    """Logistic binary rewards, bilinear in context and action vectors."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 0])
        self.action_context = rng.standard_normal((10, 5))
        self._c, self._d = rng.uniform(-1, 1, 5), rng.uniform(-1, 1, 5)
        self._m = rng.uniform(-1, 1, (5, 5))
        self._seed = seed

    def sample(self, n: int, seed: int) -> dict[str, Any]:
        rng = np.random.default_rng([self._seed, 1, seed])
        x, a = rng.standard_normal((n, 5)), self.action_context
        q = 1 / (1 + np.exp(-((x @ self._c)[:, None] + a @ self._d + x @ self._m @ a.T)))
        pi_b = np.exp(q) / np.exp(q).sum(1, keepdims=True)
        action = (pi_b.cumsum(1) < rng.random(n)[:, None]).sum(1).clip(max=9)
        rows = np.arange(n)
        return {
            "context": x,
            "action_context": a,
            "action": action,
            "reward": (rng.random(n) < q[rows, action]).astype(float),
            "pscore": pi_b[rows, action],
            "expected_reward": q,
            "pi_b": pi_b,
        }


def nearest_worlds(candidates: int, count: int) -> list[World]:
    def distance(seed: int) -> float:
        logging, optimum, _ = baselines(World(seed), 1000)
        return (logging - SIMILAR["logging"]) ** 2 + (optimum - SIMILAR["optimum"]) ** 2

    return [World(seed) for seed in sorted(range(candidates), key=distance)[:count]]


def baselines(world: World, contexts: int) -> tuple[float, float, float]:
    """Return the values of the logging policy, the optimal policy and the best fixed action."""
    log = world.sample(contexts, seed=99)
    q = log["expected_reward"]
    return float((log["pi_b"] * q).sum(1).mean()), float(q.max(1).mean()), float(q.mean(0).max())


def learn(world: World, objective: str, seed: int, epochs: int) -> dict[str, Any]:
    test = world.sample(5000, seed=99)
    learner = TwoTowerPolicyLearner(
        5,
        5,
        embedding_dim=10,
        hidden_layer_sizes=(30, 30, 30),
        objective=objective,
        reward_model={
            "kind": "dense" if objective == "dr" else "none",
            "estimator": "sklearn.neural_network:MLPRegressor",
            "arguments": {"hidden_layer_sizes": [10, 10, 10]},
            "folds": 1,
        },
        optimizer="adam",
        learning_rate=0.005,
        weight_decay=1e-6,
        gradient_clip=None,
        batch_size=32,
        epochs=epochs,
        shuffle=False,
        random_state=seed,
    )
    began = time.perf_counter()
    learner.fit(world.sample(1000, seed=seed + 1))
    return {
        "objective": objective,
        "seed": seed,
        "value": value(learner, test),
        "seconds": round(time.perf_counter() - began, 1),
    }


def value(learner: TwoTowerPolicyLearner, test: dict[str, Any]) -> float:
    pi = learner.predict_proba(test["context"], test["action_context"])[:, :, 0]
    return float((pi * test["expected_reward"]).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    worlds = nearest_worlds(arguments.candidates, arguments.seeds)
    logging, optimum, fixed = np.mean([baselines(world, 5000) for world in worlds], axis=0)
    print(f"logging {logging:.3f}  best fixed action {fixed:.3f}  optimum {optimum:.3f}")
    results = [
        learn(world, objective, seed, arguments.epochs)
        for objective in OBJECTIVES
        for seed, world in enumerate(worlds)
    ]
    summary = {}
    for objective in OBJECTIVES:
        values = [r["value"] for r in results if r["objective"] == objective]
        summary[objective] = {"mean": np.mean(values), "spread": np.std(values, ddof=1)}
        print(
            f"{objective:<11} {np.mean(values):.3f}  spread {np.std(values, ddof=1):.3f}  "
            f"(similar experiment: {SIMILAR[objective]:.3f})"
        )
    if arguments.json is not None:
        content = {
            "logging": logging,
            "optimum": optimum,
            "best_fixed_action": fixed,
            "settings": {"seeds": arguments.seeds, "epochs": arguments.epochs},
            "results": results,
            "summary": summary,
        }
        arguments.json.write_text(json.dumps(content, indent=2, default=float))


if __name__ == "__main__":
    main()
