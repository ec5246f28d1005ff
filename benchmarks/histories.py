"""True values of policies whose towers read histories, and of one that does not.

The reward of a simulated world depends on the histories of its contexts; 20,000 rows are logged
with known propensities. The values of the policies that are learned from them are exact sums over
all items, averaged over the same 4,000 new contexts, with the standard errors of their differences
to that of the first encoder.
`auto` chooses its objective and towers; it takes the encoder from the configuration.

    python benchmarks/histories.py --objectives weighted_likelihood dr --json histories.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.encoding import to_tensors
from offtower.data.simulate import HistorySettings, LoggingPolicy, SimulatedWorld, WorldSettings
from offtower.models.items import ItemFeatures
from offtower.models.store import load_policy
from offtower.training.run import train_run

ENCODERS = ("none", "mean", "attention", "transformer")


def history_world(settings: HistorySettings, seed: int = 5) -> SimulatedWorld:
    """40 items, logged by a policy that prefers rewarded ones a little."""
    return SimulatedWorld(
        40,
        WorldSettings(4, 4, 4, scale=2.5, intercept=-2.0, history=settings),
        seed=seed,
        logging=LoggingPolicy("contextual", 0.3, 0.2),
    )


@dataclass(frozen=True)
class Task:
    """A world, its log in a folder, and the contexts of the values."""

    world: SimulatedWorld
    folder: Path
    rows: int = 20_000

    def write(self) -> None:
        """Write the catalogue, and the log with and without histories in its schema."""
        world, schema = self.world, self.world.log_schema
        write_catalogue(self.folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
        write_log(self.folder / "seen", world.log(self.rows, seed=1), schema)
        plain = replace(schema, context=schema.context[:1])
        write_log(self.folder / "plain", world.log(self.rows, seed=1), plain)

    @cached_property
    def contexts(self) -> pa.Table:
        return self.world.contexts(4000, seed=9)

    def rewards(self, objective: str, encoder: str) -> NDArray[np.float64]:
        """Train and return the (4000,) expected rewards; encoder "none" reads no history."""
        log = "plain" if encoder == "none" else "seen"
        history = {"encoder": "mean" if encoder == "none" else encoder, "layers": 1, "width": 16}
        tower = {"hidden_layer_sizes": [32]}
        config = parse_config(
            {
                "name": f"{objective}-{encoder}",
                "runs": str(self.folder / "runs"),
                "data": {
                    "train": str(self.folder / log),
                    "catalogue": str(self.folder / "catalogue"),
                },
                "policy": {
                    "embedding_dim": 8,
                    "item_bias": True,
                    "context_tower": {**tower, "history": history},
                    "item_tower": tower,
                },
                "reward_model": {"kind": "factored", "folds": 2, "epochs": 5, "tower": tower},
                "objective": {"name": objective},
                "training": {"epochs": 8, "batch_size": 256, "learning_rate": 5e-3, "threads": 1},
            }
        )
        train_run(config)
        policy, _ = load_policy(config.run_directory / "policy")
        catalogue = self.world.catalogue()
        with torch.no_grad():
            items = policy.embed_items(ItemFeatures.from_catalogue(catalogue, policy.item_encoding))
        return self.world.policy_rewards(
            self.contexts,
            lambda some: policy.embed_contexts(to_tensors(policy.context_encoding.encode(some))),
            items.embedding,
            temperature=policy.temperature,
            item_bias=items.bias,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objectives", nargs="+", default=["weighted_likelihood"])
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--rows", type=int, default=20_000, help="of the log")
    parser.add_argument("--seed", type=int, default=5, help="of the world")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        world = history_world(HistorySettings(length=8), options.seed)
        task = Task(world, Path(folder), options.rows)
        task.write()
        logging = world.logging_rewards(task.contexts).mean()
        lines.append({"policy": "logging", "value": float(logging)})
        print(json.dumps(lines[-1]), flush=True)
        for objective in options.objectives:
            without: NDArray[np.float64] | None = None
            for encoder in options.encoders:
                found = task.rewards(objective, encoder)
                without = found if without is None else without
                gain = found - without
                lines.append(
                    {
                        "objective": objective,
                        "encoder": encoder,
                        "value": float(found.mean()),
                        "gain": float(gain.mean()),
                        "gain_std_error": float(gain.std() / np.sqrt(len(gain))),
                    }
                )
                print(json.dumps(lines[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
