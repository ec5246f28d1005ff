"""IPS, DR and regression as a plain training loop runs them, on synthetic logs with known truth.

Settings to reproduce, not to ship: towers 30-30-30 with ELU, Adam 0.005 with weight decay 1e-6,
batches of 32 in the order of the log, 200 epochs, a reward model fitted and read on the same rows.
Values are those of the softmax policy, exact, on 5,000 contexts that no log holds.

    python benchmarks/plain_objectives.py --json plain_objectives.json

World: OBP 0.4.1's logistic rewards, 10 actions, context and action vectors of dimension 5, behaviour
softmax(q). The world whose logging policy and optimum are nearest to .609 and .956 (figures of a like
experiment) is picked among the seeds 0 to 399 before anything is learned.
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
from offtower.data.simulate import ObpWorld

LIKE = {"logging": 0.609, "optimum": 0.956, "ips": 0.766, "dr": 0.763, "regression": 0.887}
OBJECTIVES = ("regression", "ips", "dr")


def nearest_world(candidates: int) -> ObpWorld:
    def distance(seed: int) -> float:
        logging, optimum = landmarks(ObpWorld(10, 5, 5, 1.0, seed), 1000)
        return (logging - LIKE["logging"]) ** 2 + (optimum - LIKE["optimum"]) ** 2

    return ObpWorld(10, 5, 5, 1.0, min(range(candidates), key=distance))


def landmarks(world: ObpWorld, contexts: int) -> tuple[float, float]:
    """Value of the logging policy, and of the best one."""
    log = world.sample(contexts, seed=99)
    q = log["expected_reward"]
    return float((log["pi_b"][:, :, 0] * q).sum(1).mean()), float(q.max(1).mean())


def learn(world: ObpWorld, objective: str, seed: int, epochs: int) -> dict[str, Any]:
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
    world = nearest_world(arguments.candidates)
    logging, optimum = landmarks(world, 5000)
    print(f"logging {logging:.3f}  optimum {optimum:.3f}")
    results = [
        learn(world, objective, seed, arguments.epochs)
        for objective in OBJECTIVES
        for seed in range(arguments.seeds)
    ]
    summary = {}
    for objective in OBJECTIVES:
        values = [r["value"] for r in results if r["objective"] == objective]
        summary[objective] = {"mean": np.mean(values), "spread": np.std(values, ddof=1)}
        print(
            f"{objective:<11} {np.mean(values):.3f}  spread {np.std(values, ddof=1):.3f}  "
            f"(a like experiment: {LIKE[objective]:.3f})"
        )
    if arguments.json is not None:
        content = {
            "logging": logging,
            "optimum": optimum,
            "settings": {"seeds": arguments.seeds, "epochs": arguments.epochs},
            "results": results,
            "summary": summary,
        }
        arguments.json.write_text(json.dumps(content, indent=2, default=float))


if __name__ == "__main__":
    main()
