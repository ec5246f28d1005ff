"""What successive halving costs in the choice of `offtower tune`, and what it saves.

    python benchmarks/tune_halving.py --seeds 6

Every trial of the default space is trained to its end. A trial in pieces has the bits of one at
once (`tests/training/test_tune.py`), so the choices of each reduction factor are read off its
validations. True values of the bilinear world are exact. One line of JSON for each log.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from offtower.benchmarks.quality.bilinear import bilinear
from offtower.benchmarks.quality.methods import search_inputs
from offtower.benchmarks.quality.world import value
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.evaluation.intervals import simultaneous_confidence
from offtower.progress import Progress
from offtower.training.halving import best, rungs
from offtower.training.run import build_trainer
from offtower.training.tune import DEFAULT_SPACE, draw_trials, trial_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--actions", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1000)
    given = parser.parse_args()
    for seed in range(given.seeds):
        print(json.dumps(one_log(seed, given.trials, given.actions, given.rounds)), flush=True)


def one_log(seed: int, trials: int, actions: int, rounds: int) -> dict[str, object]:
    world = bilinear(actions, 1.0, rounds, seed)
    data, base = search_inputs(world, seed)
    base.training.threads = 1
    confidence = simultaneous_confidence(base.evaluation.confidence, trials)
    configs, scores, values, seconds = [], [], [], []
    for number, overrides in enumerate(draw_trials(DEFAULT_SPACE, trials, seed)):
        config = trial_config(base, number, overrides, confidence)
        began = time.process_time()
        model = obtain_reward_model(config.reward_model, data, config.seed, Progress())
        fitted = time.process_time()
        trainer = build_trainer(config, data, model)
        history = trainer.fit().history
        seconds.append((fitted - began, time.process_time() - fitted))
        configs.append(config)
        scores.append([line["validation"] for line in history])
        values.append(value(world, trainer.policy, data.items).softmax)

    def low(trial: int, epochs: int) -> float:
        kept = max(scores[trial][:epochs], key=lambda score: score["low"])
        return float(kept["simultaneous_low"])

    found: dict[str, object] = {"seed": seed, "best": max(values), "mean": float(np.mean(values))}
    for factor in (1, 2, 3, 4):
        going, epochs = list(range(trials)), [0] * trials
        for rung in rungs([config.training for config in configs], factor):
            lows = [low(trial, epochs[trial]) if epochs[trial] else 0.0 for trial in going]
            going = [going[k] for k in best(lows, rung.trials)]
            for trial in going:
                epochs[trial] = rung.epochs(configs[trial].training)
        ends = [len(one) for one in scores]  # Patience may have ended a trial earlier.
        spent = sum(
            model + rest * min(reached, end) / end
            for (model, rest), reached, end in zip(seconds, epochs, ends, strict=True)
        )
        chosen = max(going, key=lambda trial: low(trial, 30))
        found[f"factor {factor}"] = {
            "chosen": chosen,
            "value": values[chosen],
            "low": low(chosen, 30),
            "epochs": sum(min(pair) for pair in zip(epochs, ends, strict=True)),
            "cpu_seconds": round(spent, 2),
        }
    return found


if __name__ == "__main__":
    main()
