"""Effects of the initial weights, the temperature schedule and a KL penalty on learned policies.

    python benchmarks/experiments/starts.py --json starts.json

Logs have 1,000 rounds of the bilinear world of 10 actions, logged by softmax(beta q). `clipped_ips`
and `clipped_dr` (weights clipped at 10) use the settings of `offtower benchmark quality`; one
setting at a time is changed. The clone is a run of `behavior_cloning` on the same log. Reported are
the exact value of the softmax policy on held-out contexts and its mean KL divergence from the true
logging policy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offtower.benchmarks.quality.bilinear import BilinearWorld, bilinear
from offtower.benchmarks.quality.world import QualityWorld, value
from offtower.config import parse_config
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.data.encoding import to_tensors
from offtower.data.simulate.features import vector_matrix
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import save_policy
from offtower.prepare import PreparedData, prepare
from offtower.progress import Progress
from offtower.training.run import build_trainer

ROUNDS, ACTIONS = 1000, 10
EPOCHS = 50

Settings = Mapping[str, Mapping[str, Any]]


def variants(clone: str) -> dict[str, Settings]:
    """Return the settings of each variant that differ from the default ones."""

    def temperature(begin: float) -> Settings:
        return {"training": {"initial_temperature": begin}}

    near: dict[str, Settings] = {}
    for kl in (0.05, 0.2, 1.0):
        near[f"kl {kl:g}, estimated"] = {"objective": {"kl": kl}}
        near[f"kl {kl:g}, exact"] = {"objective": {"kl": kl, "kl_policy": clone}}
    warm = {"warm_start": clone}
    return {
        "random start": {},
        "uniform start": {"training": {"initialization": "uniform"}},
        "warm start": {"training": warm},
        "temperature 4 to 1": temperature(4.0),
        "temperature 1/4 to 1": temperature(0.25),
        **near,
        "warm start, kl 1, exact": {**near["kl 1, exact"], "training": warm},
    }


def learn(
    data: PreparedData, seed: int, objective: str, variant: Settings, epochs: int
) -> TwoTowerPolicy:
    """Train a policy and return it with its last weights."""
    tower = {"hidden_layer_sizes": [64, 64]}
    arguments = {} if objective == "behavior_cloning" else {"max_weight": 10.0}
    config = parse_config(
        {
            "name": "starts",
            "seed": seed,
            "data": {"train": "memory", "catalogue": "memory"},
            "policy": {"embedding_dim": 32, "context_tower": tower, "item_tower": tower},
            "reward_model": {"kind": "factored" if objective == "clipped_dr" else "none"},
            "objective": {
                "name": objective,
                "arguments": arguments,
                **variant.get("objective", {}),
            },
            "training": {
                "epochs": epochs,
                "batch_size": 256,
                "learning_rate": 3e-3,
                "log_every_steps": None,
                "measure_terms": False,
                **variant.get("training", {}),
            },
        }
    )
    model = obtain_reward_model(config.reward_model, data, seed, Progress())
    trainer = build_trainer(config, data, model)
    trainer.fit()
    return trainer.policy


@torch.no_grad()
def divergence(
    policy: TwoTowerPolicy, quality: QualityWorld, world: BilinearWorld, data: PreparedData
) -> float:
    """Return the mean KL(pi || pi_0) over held-out contexts."""
    table = quality.truth.contexts
    context = policy.embed_contexts(to_tensors(policy.context_encoding.encode(table)))
    items = policy.embed_items(data.items)
    log_pi = torch.log_softmax((context @ items.embedding.T).double() / policy.temperature, dim=1)
    column = table.column("context").combine_chunks()
    x = vector_matrix(column, len(column[0])).astype(np.float64)
    log_logging = torch.from_numpy(np.log(world.logging(world.expected(x))))
    return float((log_pi.exp() * (log_pi - log_logging)).sum(dim=1).mean())


def results(beta: float, seed: int, objectives: Sequence[str], clone_epochs: int) -> dict[str, Any]:
    """Return values and KL divergences by objective and variant, for one world."""
    quality = bilinear(ACTIONS, beta, ROUNDS, seed)
    world = BilinearWorld(ACTIONS, beta, seed)
    data = prepare(quality.log, None, quality.catalogue, Progress())

    def evaluate(policy: TwoTowerPolicy) -> list[float]:
        found = value(quality, policy, data.items)
        return [found.softmax, found.greedy, divergence(policy, quality, world, data)]

    with tempfile.TemporaryDirectory() as folder:
        clone = learn(data, seed, "behavior_cloning", {}, clone_epochs)
        save_policy(Path(folder) / "clone", clone, {})
        found: dict[str, Any] = {
            "baselines": quality.baselines,
            "clone": evaluate(clone),
        }
        for objective in objectives:
            found[objective] = {
                name: evaluate(learn(data, seed, objective, variant, EPOCHS))
                for name, variant in variants(f"{folder}/clone").items()
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--objectives", nargs="*", default=["clipped_ips", "clipped_dr"])
    parser.add_argument("--betas", nargs="*", type=float, default=[1.0, -1.0, 5.0])
    parser.add_argument("--clone-epochs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    everything: dict[str, Any] = {}
    for beta in arguments.betas:
        runs = [
            results(beta, seed, arguments.objectives, arguments.clone_epochs)
            for seed in range(arguments.seeds)
        ]
        everything[f"beta {beta:g}"] = runs
        marks = {k: np.mean([run["baselines"][k] for run in runs]) for k in runs[0]["baselines"]}
        print(f"beta {beta:g}: " + "  ".join(f"{k} {v:.3f}" for k, v in marks.items()))
        print("  clone: " + _line([run["clone"] for run in runs]))
        for objective in arguments.objectives:
            plain = np.array([run[objective]["random start"][0] for run in runs])
            for name in runs[0][objective]:
                lines = [run[objective][name] for run in runs]
                more = np.array([line[0] for line in lines]) - plain
                error = more.std(ddof=1) / len(more) ** 0.5 if len(more) > 1 else float("nan")
                print(
                    f"  {objective:<12} {name:<26} {_line(lines)}  "
                    f"minus random start {more.mean():+.3f} +- {error:.3f}"
                )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(everything, indent=2))


def _line(lines: list[list[float]]) -> str:
    """Format the softmax value with its spread over seeds, the greedy value and the KL."""
    softmax, greedy, far = (np.array([line[k] for line in lines]) for k in range(3))
    spread = softmax.std(ddof=1) if len(lines) > 1 else float("nan")
    return f"{softmax.mean():.3f} ({spread:.3f}) greedy {greedy.mean():.3f} KL {far.mean():.3f}"


if __name__ == "__main__":
    main()
