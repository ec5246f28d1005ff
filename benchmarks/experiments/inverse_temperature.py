"""Value of softmax policies by inverse temperature, compared with the greedy policy.

    python benchmarks/experiments/inverse_temperature.py --json inverse_temperature.json

A linear two-tower regression on 1,000 simulated rounds is cross-fitted and ensembled as by auto.
Reported is the true value of softmax(factor x logits) as a fraction of the optimum for each
inverse temperature of auto (in units of the smallest), for the logits without a factor, and for the
greedy policy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from offtower.benchmarks.quality.bilinear import bilinear
from offtower.benchmarks.quality.world import value
from offtower.config import parse_config
from offtower.prepare import prepare
from offtower.progress import Progress
from offtower.training.auto import train_auto
from offtower.training.auto.ensemble import join

NAME = "regression_linear"


def shares(actions: int, beta: float, seed: int) -> dict[str, float]:
    world = bilinear(actions, beta, 1000, seed)
    data = prepare(world.log, None, world.catalogue, Progress())
    config = parse_config(
        {
            "name": "inverse-temperature",
            "seed": seed,
            "data": {"train": "memory", "catalogue": "memory"},
            "auto": {"candidates": [NAME], "refit": False},
        }
    )
    found = train_auto(config, data)
    options = found.choice.estimates[NAME]
    first = options[0].inverse_temperature
    policies = {
        f"{o.inverse_temperature / first:g}": join(found.members[NAME], o.inverse_temperature)
        for o in options
    }
    policies["no factor"] = join(found.members[NAME], 1.0)
    best = world.baselines["optimum"]
    result = {k: value(world, p, data.items).softmax / best for k, p in policies.items()}
    greedy = value(world, policies["no factor"], data.items).greedy / best
    return {**result, "greedy": greedy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    summary = {}
    for actions, beta in ((10, 1.0), (10, -1.0), (100, 1.0)):
        lines = [shares(actions, beta, seed) for seed in range(arguments.seeds)]
        mean = {key: float(np.mean([line[key] for line in lines])) for key in lines[0]}
        summary[f"{actions} actions, beta {beta:g}"] = mean
        print(
            f"{actions} actions, beta {beta:g}: "
            + "  ".join(f"{key} {found:.3f}" for key, found in mean.items())
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
