"""Is a policy trained with eligible items better than one that is filtered afterwards?

    python benchmarks/experiments/eligible_learning.py --seeds 10 --json eligible.json

A simulated recommender shows items by region: a region has about half of the items, or with
`--everywhere 20` a fifth of them and its part of the others. Two policies
learn from one log with the propensities of the choice among eligible items. One is trained with the
section `eligible`, the other without; both show eligible items only. Reported are their true values
on the same contexts, and those of the logging policy and of the best eligible item, by seed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from offtower.config import parse_config
from offtower.data.encoding import to_tensors
from offtower.data.log import TableLog
from offtower.data.simulate import (
    EligibilitySettings,
    LoggingPolicy,
    SimulatedWorld,
    WorldSettings,
    slate_value,
)
from offtower.data.simulate.rounds import single_draw
from offtower.prepare import prepare
from offtower.progress import Progress
from offtower.training.run import build_trainer


def values(args: argparse.Namespace, seed: int) -> dict[str, float]:
    """True values in one world."""
    world = SimulatedWorld(
        args.items,
        WorldSettings(args.dim, args.dim, args.dim, scale=args.scale, popularity=args.popularity),
        seed=seed,
        logging=LoggingPolicy(epsilon=args.epsilon),
        eligible=EligibilitySettings(regions=args.regions, everywhere=args.everywhere),
    )
    log = pa.concat_tables(world.log(args.rows, seed=1))
    contexts = world.contexts(args.contexts, seed=2)
    mask = world.eligible.mask(contexts) if world.eligible is not None else None
    assert mask is not None
    logit = world.context_latent(contexts) @ world.item_latent.T + world.item_logit
    best = torch.sigmoid(logit).numpy()
    logging = slate_value(
        world, lambda chunk: single_draw(world, world.logging_policy, chunk), contexts
    )
    return {
        "with": learned(args, world, log, contexts, with_sets=True),
        "filtered": learned(args, world, log, contexts, with_sets=False),
        "logging": logging.value,
        "best": float(np.where(mask, best, 0.0).max(axis=1).mean()),
    }


def learned(
    args: argparse.Namespace,
    world: SimulatedWorld,
    log: pa.Table,
    contexts: pa.Table,
    *,
    with_sets: bool,
) -> float:
    """The true value, among eligible items, of a policy that is trained with or without them."""
    schema = world.log_schema if with_sets else replace(world.log_schema, eligible=None)
    data = prepare(TableLog(log, schema), None, world.catalogue(), Progress())
    tower = {"hidden_layer_sizes": [args.hidden]}
    config = parse_config(
        {
            "name": "eligible",
            "seed": world.seed,
            "data": {"train": "in-memory", "catalogue": "in-memory"},
            "policy": {
                "embedding_dim": 8,
                "item_bias": True,
                "context_tower": tower,
                "item_tower": tower,
            },
            "objective": {"name": args.objective},
            "training": {
                "epochs": args.epochs,
                "batch_size": 256,
                "learning_rate": args.learning_rate,
                "log_every_steps": None,
                "measure_terms": False,
            },
        }
    )
    trainer = build_trainer(config, data, None, progress=Progress())
    trainer.fit()
    policy = trainer.policy.eval()
    with torch.no_grad():
        items = policy.embed_items(data.items)

    def embed(chunk: pa.Table) -> torch.Tensor:
        return policy.embed_contexts(to_tensors(policy.context_encoding.encode(chunk)))

    served = world.two_tower(
        embed, items.embedding, temperature=policy.temperature, item_bias=items.bias
    )
    return slate_value(world, served, contexts).value


def summary(found: list[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds, and the paired gain."""
    gain = np.array([one["with"] - one["filtered"] for one in found])
    return {
        "mean": {name: float(np.mean([one[name] for one in found])) for name in found[0]},
        "gain": float(gain.mean()),
        "gain_std_error": float(gain.std(ddof=1) / len(gain) ** 0.5) if len(gain) > 1 else None,
        "least_gain": float(gain.min()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--regions", type=int, default=20)
    parser.add_argument(
        "--everywhere", type=int, help="percentage of items of all regions; the others are in one"
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8_000)
    parser.add_argument("--contexts", type=int, default=1_000, help="on which values are computed")
    parser.add_argument("--dim", type=int, default=4)
    parser.add_argument("--scale", type=float, default=1.5, help="of contexts and items together")
    parser.add_argument("--popularity", type=float, default=0.5, help="of the items alone")
    parser.add_argument("--epsilon", type=float, default=0.3, help="uniform draws of the log")
    parser.add_argument("--objective", default="ips")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    found = []
    for seed in range(args.seeds):
        found.append(values(args, seed))
        print(seed, {name: round(value, 4) for name, value in found[-1].items()}, flush=True)
    settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
    result = {"arguments": settings, "values": found, **summary(found)}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in result if key != "values"}, indent=2))


if __name__ == "__main__":
    main()
