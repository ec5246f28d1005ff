"""Thirty days of a catalogue in which 5 % of the items are new each day: daily runs that go on from
one another against retraining on all logs.

Both learn from the same logs, which a fixed policy writes: half uniform, half a softmax of noisy
scores. Rewards depend on the context, on features of the items, and on a part that only their ids
show. Each day's daily run reads that day's log and replays a share of older ones; a full run reads
the logs of all days so far, restricted to the items that are still there. True values are exact
sums over the day's catalogue, averaged over the same contexts. The computation is counted in rows
of training (epochs x rows) and in seconds of the processor.

    python benchmarks/daily.py --seed 2 --json daily.json --picture docs/images/daily.svg
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from offtower.config import Config, apply_overrides, parse_config
from offtower.data import Catalogue, write_catalogue, write_log
from offtower.data.encoding import to_tensors
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.models.items import ItemFeatures
from offtower.models.store import load_policy
from offtower.training.run import train_run

Array = NDArray[np.float64]

DIM = 6
ITEMS = CatalogueSchema(
    item_id="item",
    features=(
        FeatureSpec(name="item", kind="category"),
        FeatureSpec(name="content", kind="vector", dim=DIM),
    ),
)
ROWS = LogSchema(
    context=(FeatureSpec(name="person", kind="vector", dim=DIM),),
    action="item",
    reward="reward",
    pscore="pscore",
)


class World:
    """Items that live for 20 days, and rewards of contexts and items.

    Args:
        items: of a day; one in twenty is replaced each day, the oldest first.
        rows: of a day's log.
        hidden: share of an item's effects that its features do not show.
    """

    def __init__(
        self, seed: int, days: int, items: int = 200, rows: int = 2000, hidden: float = 0.4
    ) -> None:
        self.seed, self.days, self.items, self.rows = seed, days, items, rows
        rng = np.random.default_rng([seed, 0])
        total = items + days * self.new_items
        self.content: Array = rng.normal(size=(total, DIM))
        own = rng.normal(size=(total, DIM))
        mixing = rng.normal(size=(DIM, DIM)) / DIM**0.5
        self.effect: Array = np.sqrt(1 - hidden) * self.content @ mixing + np.sqrt(hidden) * own
        self.noisy: Array = self.effect + 2.0 * rng.normal(size=(total, DIM))
        self.liking: Array = rng.normal(size=total)

    @property
    def new_items(self) -> int:
        return self.items // 20

    def catalogue(self, day: int) -> NDArray[np.int64]:
        """Numbers of a day's items."""
        return np.arange(day * self.new_items, day * self.new_items + self.items)

    def contexts(self, count: int, *purpose: int) -> Array:
        return np.random.default_rng([self.seed, *purpose]).normal(size=(count, DIM))

    def reward(self, context: Array, item: NDArray[np.int64]) -> Array:
        """(n, k) probability of a reward."""
        z = 1.5 * context @ self.effect[item].T / DIM**0.5 + 0.5 * self.liking[item] - 2.0
        return np.asarray(1.0 / (1.0 + np.exp(-z)))

    def logging(self, context: Array, item: NDArray[np.int64]) -> Array:
        """(n, k) probabilities of the policy that writes the logs."""
        score = context @ self.noisy[item].T / DIM**0.5
        soft = np.exp(score - score.max(axis=1, keepdims=True))
        soft /= soft.sum(axis=1, keepdims=True)
        return np.asarray(0.5 * soft + 0.5 / len(item))

    def log(self, day: int) -> pa.Table:
        """A day's log."""
        rng = np.random.default_rng([self.seed, 1, day])
        context, item = self.contexts(self.rows, 2, day), self.catalogue(day)
        point = rng.random((self.rows, 1))
        luck = rng.random(self.rows)
        drawn = np.zeros(self.rows, np.int64)
        pscore, expected = np.zeros(self.rows), np.zeros(self.rows)
        for start in range(0, self.rows, 2000):
            part = slice(start, start + 2000)
            probability = self.logging(context[part], item)
            chosen = (probability.cumsum(axis=1) < point[part]).sum(axis=1)
            chosen = np.minimum(chosen, len(item) - 1)
            row = np.arange(len(chosen))
            drawn[part], pscore[part] = chosen, probability[row, chosen]
            expected[part] = self.reward(context[part], item)[row, chosen]
        return pa.table(
            {
                "person": list(context),
                "item": item[drawn],
                "reward": (luck < expected).astype(np.float64),
                "pscore": pscore,
            }
        )

    def items_table(self, day: int) -> pa.Table:
        numbers = self.catalogue(day)
        return pa.table({"item": numbers, "content": list(self.content[numbers])})


@dataclass(frozen=True)
class Study:
    """A world, the folder of its logs and runs, and settings of the two ways."""

    world: World
    folder: Path
    daily: tuple[str, ...]
    full: tuple[str, ...]

    def write_day(self, day: int) -> None:
        write_catalogue(self.folder / f"items-{day}", self.world.items_table(day), ITEMS)
        write_log(self.folder / f"log-{day}", [self.world.log(day)], ROWS, rows_per_group=2000)

    def config(self, name: str, log: str, day: int, *overrides: str) -> Config:
        content: dict[str, Any] = {
            "name": name,
            "runs": str(self.folder / "runs"),
            "seed": day,
            "data": {
                "train": str(self.folder / log),
                "catalogue": str(self.folder / f"items-{day}"),
            },
            "policy": {
                "embedding_dim": 16,
                "item_bias": True,
                "context_tower": {"hidden_layer_sizes": [32]},
                "item_tower": {"hidden_layer_sizes": [32], "category_embedding_dim": 16},
            },
            "objective": "weighted_likelihood",
            "training": {
                "batch_size": 256,
                "learning_rate": 3e-3,
                "decay": "cosine",
                "checkpoint_every_seconds": 1e6,
                "measure_terms": False,
                "threads": 1,
            },
        }
        return parse_config(apply_overrides(content, overrides))

    def run_daily(self, name: str, day: int, settings: Sequence[str]) -> dict[str, float]:
        """Train the run of a day; the first has no run to go on from."""
        if day == 0:
            return self._run(self.config(f"{name}-0", "log-0", 0, *self.full), 0)
        older = [str(self.folder / f"log-{one}") for one in range(max(0, day - 20), day)]
        replay = f"incremental.replay.logs={json.dumps(older)}"
        before = f"incremental.from_run={self.folder / 'runs' / f'{name}-{day - 1}'}"
        return self._run(
            self.config(f"{name}-{day}", f"log-{day}", day, before, replay, *settings), day
        )

    def run_full(self, day: int) -> dict[str, float]:
        """Train on all logs so far, without rows of items that have left."""
        there = pa.array(self.world.catalogue(day))
        tables = []
        for one in range(day + 1):
            table = self.world.log(one)
            tables.append(table.filter(pc.is_in(table["item"], there)))
        write_log(self.folder / f"all-{day}", tables, ROWS, rows_per_group=20_000)
        return self._run(self.config(f"full-{day}", f"all-{day}", day, *self.full), day)

    def _run(self, config: Config, day: int) -> dict[str, float]:
        began = time.process_time()
        result = train_run(config)
        seconds = time.process_time() - began
        manifest = json.loads((config.run_directory / "manifest.json").read_text())
        rows = result.epochs * manifest["training_rows"]
        return {
            "day": day,
            "value": self.value(config, day),
            "steps": result.steps,
            "rows": rows,
            "seconds": round(seconds, 2),
        }

    def value(self, config: Config, day: int) -> float:
        """The exact value over the day's catalogue."""
        policy, _ = load_policy(config.run_directory / "policy")
        catalogue = Catalogue.open(self.folder / f"items-{day}")
        context = self.world.contexts(2000, 3)
        table = pa.table({"person": list(context)})
        with torch.no_grad():
            items = policy.embed_items(ItemFeatures.from_catalogue(catalogue, policy.item_encoding))
            user = policy.embed_contexts(to_tensors(policy.context_encoding.encode(table)))
            bias = 0.0 if items.bias is None else items.bias
            score = user @ items.embedding.T + bias
            probability = torch.softmax(score.double(), 1).numpy()
        return float(
            (probability * self.world.reward(context, self.world.catalogue(day))).sum(1).mean()
        )

    def baselines(self, day: int) -> dict[str, float]:
        """Values of the logging policy and of the best item of each context."""
        context, item = self.world.contexts(2000, 3), self.world.catalogue(day)
        reward = self.world.reward(context, item)
        logging = float((reward * self.world.logging(context, item)).sum(1).mean())
        return {"logging": logging, "best": float(reward.max(axis=1).mean())}


def draw(path: Path, found: dict[str, Any]) -> None:
    """Values by day."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 3.6))
    styles = {"daily": ("C0", "-"), "full": ("C1", "o"), "never": ("C7", "--")}
    labels = {
        "daily": "a daily run from yesterday's",
        "full": "retrained on all logs",
        "never": "day 0's policy, never retrained",
    }
    for name, (color, style) in styles.items():
        lines = found[name]
        axes.plot(
            [x["day"] for x in lines],
            [x["value"] for x in lines],
            style,
            color=color,
            label=labels[name],
        )
    axes.plot(
        [x["day"] for x in found["baselines"]],
        [x["logging"] for x in found["baselines"]],
        ":",
        color="black",
        label="the logging policy",
    )
    axes.set_xlabel("day (5 % of the items are new each day)")
    axes.set_ylabel("true value")
    axes.set_ylim(bottom=0.0)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--every", type=int, default=15, help="days between full runs")
    parser.add_argument("--items", type=int, default=200, help="of a day")
    parser.add_argument("--rows", type=int, default=2000, help="of a day's log")
    parser.add_argument("--full-epochs", type=int, default=40)
    parser.add_argument("--daily-epochs", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.7, help="of replayed rows")
    parser.add_argument("--set", action="append", default=[], help="settings of the daily runs")
    parser.add_argument("--set-all", action="append", default=[], help="settings of all runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    daily = (
        f"training.epochs={options.daily_epochs}",
        f"incremental.replay.share={options.share}",
        *options.set_all,
        *options.set,
    )
    full = (f"training.epochs={options.full_epochs}", *options.set_all)
    found: dict[str, Any] = {
        "seed": options.seed,
        "daily": [],
        "full": [],
        "never": [],
        "baselines": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        world = World(options.seed, options.days, options.items, options.rows)
        study = Study(world, Path(folder), daily, full)
        for day in range(options.days):
            study.write_day(day)
            found["daily"].append(study.run_daily("daily", day, daily))
            first = study.config("daily-0", "log-0", 0, *full)
            found["never"].append({"day": day, "value": study.value(first, day)})
            found["baselines"].append({"day": day, **study.baselines(day)})
            if day % options.every == options.every - 1:
                found["full"].append(study.run_full(day))
                found["summary"] = summary(found)
            print(json.dumps({"day": day, "value": found["daily"][-1]["value"]}), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found.get("summary"), indent=1))
    if options.picture is not None:
        draw(options.picture, found)


def summary(found: dict[str, Any]) -> dict[str, float]:
    """Ratios on the days with full runs."""
    by_day = {line["day"]: line for line in found["daily"]}
    full = found["full"]
    daily = [by_day[line["day"]] for line in full]
    ratio = [d["value"] / f["value"] for d, f in zip(daily, full, strict=True)]
    logging = {line["day"]: line["logging"] for line in found["baselines"]}
    gain = [
        (d["value"] - logging[d["day"]]) / (f["value"] - logging[d["day"]])
        for d, f in zip(daily, full, strict=True)
    ]
    return {
        "value_ratio_mean": float(np.mean(ratio)),
        "value_ratio_min": float(np.min(ratio)),
        "gain_ratio_mean": float(np.mean(gain)),
        "rows_ratio": sum(d["rows"] for d in daily) / sum(f["rows"] for f in full),
        "seconds_ratio": sum(d["seconds"] for d in daily) / sum(f["seconds"] for f in full),
    }


if __name__ == "__main__":
    main()
