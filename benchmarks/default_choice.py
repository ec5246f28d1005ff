"""The choice of objective=auto with and without comparison to the logging policy, on the same rows.

    python benchmarks/default_choice.py --out results/choice.jsonl --seeds 0 1 2

Fits each degenerate world of the quality suite once, by default or shorter (`--short`: three
candidates, about 150 steps), and makes both choices from the same evidence. A line of JSON per
world and seed; an interrupted run resumes, and `--minutes` ends it after so many. Seeds from 1000
on were used for development.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from offtower.benchmarks.quality.degenerate import WORLDS, degenerate
from offtower.benchmarks.quality.summary import safety
from offtower.benchmarks.quality.world import QualityWorld, value
from offtower.config import parse_config
from offtower.prepare import prepare
from offtower.progress import Progress
from offtower.training.auto import train_auto
from offtower.training.auto.choice import choose
from offtower.training.auto.ensemble import join
from offtower.training.auto.prior_order import CLONE

STEPS = 150
CANDIDATES = ("regression_linear", "likelihood_linear", CLONE)
NEGATIVE = ("regression_linear", "regression", CLONE)
"""Likelihoods need rewards of at least 0."""


def short(world: QualityWorld) -> dict[str, Any]:
    """Settings of shorter fits than by default."""
    rows = world.log.num_rows
    batch = min(1024, max(64, 1 << max(0, (rows // 16).bit_length() - 1)), rows)
    return {
        "candidates": NEGATIVE if world.log.schema.reward_range[0] < 0.0 else CANDIDATES,
        "epochs": math.ceil(STEPS * batch / rows),
        "budget": None,
    }


def measure(world: QualityWorld, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Make both choices and return their true values and lower bounds."""
    data = prepare(world.log, None, world.catalogue, Progress())
    low, high = world.log.schema.reward_range
    began = time.process_time()
    found = train_auto(
        parse_config(
            {
                "name": "choice",
                "seed": seed,
                "data": {"train": "memory", "catalogue": "memory"},
                "auto": settings,
            }
        ),
        data,
    )
    seconds = time.process_time() - began
    others = [name for name in found.choice.estimates if name != CLONE]
    before = choose(found.rows, others, min_reward=low).chosen
    policy = join(found.members[before.name], before.inverse_temperature)
    members = join(found.members[found.choice.chosen.name], found.choice.chosen.inverse_temperature)
    return {
        "baselines": world.baselines,
        "processor_seconds": round(seconds, 2),
        "value": value(world, found.policy, data.items).softmax,
        "value_before_refit": value(world, members, data.items).softmax,
        "facts": {
            "chosen": found.choice.chosen.name,
            "keep_logging": found.choice.keep_logging,
            "low": found.choice.low,
            "estimate": found.choice.value,
            "highest": found.choice.chosen.value,
            "logging": found.choice.logging,
            "reward_range": [low, high],
        },
        "without": {
            "chosen": before.name,
            "low": before.low,
            "value": value(world, policy, data.items).softmax,
        },
    }


def without_comparison(line: dict[str, Any]) -> dict[str, Any]:
    """The same line for the choice without the logging policy."""
    old = line["without"]
    facts = {**line["facts"], "keep_logging": False, "low": old["low"]}
    return {**line, "value": old["value"], "facts": facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--minutes", type=float, default=math.inf)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = []
    if arguments.out.exists():
        lines = [json.loads(text) for text in arguments.out.read_text().splitlines()]
    done = {(line["world"], line["seed"]) for line in lines}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60.0 * arguments.minutes
    for seed in arguments.seeds:
        for name in arguments.worlds:
            if (name, seed) in done or time.monotonic() > ends:
                continue
            world = degenerate(name, seed)
            settings = short(world) if arguments.short else {}
            line = {"world": name, "seed": seed, **measure(world, seed, settings)}
            lines.append(line)
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{name:<36} {seed:>5} logging {line['baselines']['logging']:.3f}", end="")
            kept = " keep" if line["facts"]["keep_logging"] else ""
            print(
                f"  {line['value']:.3f} (without {line['without']['value']:.3f}){kept}", flush=True
            )
    print("with comparison   ", safety(lines))
    print("without comparison", safety([without_comparison(line) for line in lines]))


if __name__ == "__main__":
    main()
