"""Whether the choice of ASHA (Ray Tune) depends on timing, on the searches of `tune_halving.py`.

    python benchmarks/experiments/tune_asha.py --seeds 1 2 3 --repeats 3

Each search has the trials, the data and the score (largest simultaneous lower bound so far) of
`tune_halving.py`, with a reduction factor of 3 and rungs after 4 and 12 epochs. A search is
repeated with nothing changed, with 1 and 2 trials at a time. Needs Ray's extra `tune`. One line of
JSON each.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from typing import Any

import torch

from offtower.benchmarks.quality.bilinear import bilinear
from offtower.benchmarks.quality.methods import search_inputs
from offtower.benchmarks.quality.world import value
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.evaluation.intervals import simultaneous_confidence
from offtower.progress import Progress
from offtower.training.setup import build_setup
from offtower.training.trainer import TrainingOutputs
from offtower.training.tune import DEFAULT_SPACE, draw_trials, trial_config
from offtower.training.workers import SINGLE_PROCESS

ACTIONS, ROUNDS = 10, 1000


def train_trial(setting: dict[str, Any]) -> None:
    """Train one trial, and report after each epoch."""
    from ray import tune

    torch.set_num_threads(1)
    seed, trials, number = setting["seed"], setting["trials"], setting["number"]
    world = bilinear(ACTIONS, 1.0, ROUNDS, seed)
    data, base = search_inputs(world, seed)
    base.training.threads = 1
    confidence = simultaneous_confidence(base.evaluation.confidence, trials)
    config = trial_config(
        base, number, list(draw_trials(DEFAULT_SPACE, trials, seed))[number], confidence
    )
    scores: list[Any] = []
    values: list[float] = []
    model = obtain_reward_model(config.reward_model, data, config.seed, Progress())
    setup = build_setup(config, data, model, SINGLE_PROCESS, Progress())
    validate = setup.validate
    assert validate is not None

    def report(policy: Any, epoch: int) -> dict[str, float]:
        scores.append(validate(policy))
        values.append(value(world, policy, data.items).softmax)
        kept = max(range(len(scores)), key=lambda index: scores[index].low)
        low = scores[kept].simultaneous_low
        tune.report({"low": low, "number": number, "value": values[kept]})
        return {}

    setup.trainer(TrainingOutputs(on_epoch_end=report)).fit()


def search(seed: int, trials: int, at_once: int) -> dict[str, Any]:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(train_trial, {"cpu": 1}),
            param_space={
                "seed": seed,
                "trials": trials,
                "number": tune.grid_search(list(range(trials))),
            },
            tune_config=tune.TuneConfig(
                metric="low",
                mode="max",
                max_concurrent_trials=at_once,
                reuse_actors=True,
                scheduler=ASHAScheduler(max_t=30, grace_period=4, reduction_factor=3),
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        )
        began = time.monotonic()
        found = tuner.fit()
        seconds = time.monotonic() - began
    lines = [one.metrics for one in found]
    # The trial with the largest bound, as `offtower tune` chooses, the first of equal ones.
    best = min(lines, key=lambda line: (-line["low"], line["number"]))
    return {
        "seed": seed,
        "at_once": at_once,
        "chosen": best["number"],
        "value": round(best["value"], 3),
        "low": round(best["low"], 4),
        "epochs": sum(line["training_iteration"] for line in lines),
        "epochs_of_trials": [
            line["training_iteration"] for line in sorted(lines, key=lambda one: one["number"])
        ],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ot-ray-", dir="/tmp") as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=True,
            object_store_memory=200_000_000,
            _temp_dir=folder,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
        try:
            for seed in given.seeds:
                for at_once in given.at_once:
                    for _ in range(given.repeats):
                        print(json.dumps(search(seed, given.trials, at_once)), flush=True)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
