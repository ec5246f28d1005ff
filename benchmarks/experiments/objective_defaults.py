"""Settings of each named objective on small label logs and tables of actions.

    python benchmarks/experiments/objective_defaults.py --out results/objectives.jsonl --seeds 0 1 2

Every variant has width 32, AdamW at .003 and batches of 256 rows. A line of JSON holds the true
values of the softmax policy at several inverse temperatures and of the greedy one, and for
`top_k_ips` the sum over the ten best items. An interrupted run resumes. Seeds from 1000 on were
used for development.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offtower.benchmarks.quality.bilinear import bilinear
from offtower.benchmarks.quality.labels import as_feedback, digits
from offtower.benchmarks.quality.topics import topical
from offtower.benchmarks.quality.world import QualityWorld, value_of_scores
from offtower.config import parse_config
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.data.encoding import to_tensors
from offtower.models.policy import TwoTowerPolicy
from offtower.objectives import OBJECTIVES
from offtower.prepare import PreparedData, prepare
from offtower.progress import Progress
from offtower.training.run import build_trainer


@dataclass(frozen=True)
class World:
    """A world and the epochs of about 500 to 1,000 steps of 256 rows."""

    make: Callable[[int], QualityWorld]
    epochs: int


def _topics(labels: int, rounds: int, popularity: float | None = None) -> Any:
    def make(seed: int) -> QualityWorld:
        examples, tokens = (2_000, 1_000) if labels < 1_000 else (3_000, 2_000)
        texts = topical(seed, labels=labels, examples=examples, tokens=tokens)
        return as_feedback(texts, rounds, seed, popularity=popularity)

    return make


WORLDS: Mapping[str, World] = {
    "10 actions": World(lambda seed: bilinear(10, 1.0, 1_000, seed), 100),
    "10 digits": World(lambda seed: as_feedback(digits(seed), 2_000, seed, temperature=0.3), 60),
    "100 labels": World(_topics(100, 3_000), 50),
    "300 labels, by popularity": World(_topics(300, 10_000, popularity=1.0), 20),
    "1,000 labels": World(_topics(1_000, 6_000), 25),
}

INVERSE_TEMPERATURES = (1.0, 2.0, 4.0, 10.0, 20.0, 40.0)
TOP = 10


def variants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (name, objective, sections of the configuration)."""

    def of(objective: str, label: str = "", **arguments: Any) -> tuple[str, str, dict[str, Any]]:
        name = f"{objective} {label}".strip()
        return name, objective, {"objective": {"name": objective, "arguments": arguments}}

    for name in ("regression", "implicit_squares", "ips", "snips"):
        yield of(name)
    yield of("snips", "ignored", off_log="ignored")
    for name in ("clipped_ips", "weighted_likelihood", "top_k_ips", "clipped_dr", "potec"):
        for limit in (10.0, 30.0, 100.0):
            yield of(name, f"{limit:g}", max_weight=limit)
    for name in ("dr", "behavior_cloning", "softmax", "in_batch_softmax", "mixed_negatives"):
        yield of(name)
    yield of("behavior_cloning", "known propensities", known_propensities=True)


def learn(
    data: PreparedData, objective: str, sections: dict[str, Any], seed: int, epochs: int
) -> TwoTowerPolicy:
    """Train a policy and return it with its last weights."""
    needs_model = OBJECTIVES[objective].requirements.reward_model
    small = {"epochs": epochs, "batch_size": 256}
    config = parse_config(
        {
            "name": "defaults",
            "seed": seed,
            "data": {"train": "memory", "catalogue": "memory"},
            "policy": {"embedding_dim": 32, "temperature": 1.0},
            "reward_model": {"kind": "factored" if needs_model else "none", **small},
            **sections,
            "training": {
                **small,
                "learning_rate": 3e-3,
                "log_every_steps": None,
                "measure_terms": False,
                **sections.get("training", {}),
            },
        }
    )
    model = obtain_reward_model(config.reward_model, data, seed, Progress())
    trainer = build_trainer(config, data, model)
    trainer.fit()
    return trainer.policy


@torch.no_grad()
def values(world: QualityWorld, policy: TwoTowerPolicy, data: PreparedData) -> dict[str, Any]:
    """True values at the inverse temperatures, of the greedy policy and of the ten best items."""
    policy.eval()
    table = world.truth.contexts
    embedded = policy.embed_items(data.items)
    context = policy.embed_contexts(to_tensors(policy.context_encoding.encode(table)))
    logit = (context @ embedded.embedding.T).double() / policy.temperature
    if embedded.bias is not None:
        logit += embedded.bias
    q = world.truth.expected(0, table.num_rows)
    best = logit.topk(min(TOP, logit.shape[1]), dim=1).indices
    return {
        "softmax": [value_of_scores(k * logit, q).softmax for k in INVERSE_TEMPERATURES],
        "greedy": value_of_scores(logit, q).greedy,
        "top": float(q.gather(1, best).sum(dim=1).mean()),
    }


def show(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a table for each world, with means over seeds."""
    for world in dict.fromkeys(line["world"] for line in lines):
        own = [line for line in lines if line["world"] == world]
        marks = {key: np.mean([x["baselines"][key] for x in own]) for key in own[0]["baselines"]}
        yield f"\n{world}: " + "  ".join(f"{key} {mean:.3f}" for key, mean in marks.items())
        yield f"{'':<34}softmax at {INVERSE_TEMPERATURES}; greedy; top; seeds, seconds"
        for name in dict.fromkeys(line["variant"] for line in own):
            found = [line for line in own if line["variant"] == name]
            softmax = np.mean([line["softmax"] for line in found], axis=0)
            rest = [np.mean([line[key] for line in found]) for key in ("greedy", "top", "seconds")]
            yield (
                f"{name:<34}"
                + " ".join(f"{v:.3f}" for v in softmax)
                + f"  {rest[0]:.3f}  {rest[1]:.3f}  {len(found)} {rest[2]:.1f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--objectives", nargs="+", help="names before the first space")
    parser.add_argument("--variants", nargs="+", help="whole names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = []
    if arguments.out.exists():
        lines = [json.loads(text) for text in arguments.out.read_text().splitlines()]
    done = {(line["world"], line["variant"], line["seed"]) for line in lines}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for name in arguments.worlds:
            world = data = None
            for variant, objective, sections in variants():
                if arguments.objectives and objective not in arguments.objectives:
                    continue
                if arguments.variants and variant not in arguments.variants:
                    continue
                if (name, variant, seed) in done:
                    continue
                if world is None or data is None:
                    world = WORLDS[name].make(seed)
                    data = prepare(world.log, None, world.catalogue, Progress())
                began = time.process_time()
                policy = learn(data, objective, sections, seed, WORLDS[name].epochs)
                seconds = round(time.process_time() - began, 2)
                line = {
                    "world": name,
                    "variant": variant,
                    "seed": seed,
                    "baselines": world.baselines,
                    "seconds": seconds,
                    **values(world, policy, data),
                }
                lines.append(line)
                with open(arguments.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(name, variant, seed, [round(v, 3) for v in line["softmax"]], flush=True)
    print("\n".join(show(lines)))


if __name__ == "__main__":
    main()
