"""Does a policy that learns from its own logs keep improving?

    python benchmarks/experiments/relearning.py --items 100000 --seeds 10 --json relearning.json

In each of ten rounds a policy is learned from all logs so far, exported, drawn from with known
propensities, and its log ingested with simulated rewards. The first log is of a popularity policy
with half of its draws uniform. Reported are the true values of the served policies on the same
contexts, by round and seed; the difference between the last and the first in paired standard errors
over seeds; and the largest fall from one round to the next in the same unit. The JSON is written
after each seed, and a run that finds it goes on with the next one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from offtower.config import parse_config
from offtower.data import ParquetLog, write_catalogue, write_log
from offtower.data.ingest import IngestSource, ingest_files
from offtower.data.join import JoinedReward, JoinPlan, join_tables
from offtower.data.schema import LogSchema
from offtower.data.simulate import (
    LoggingPolicy,
    ServedDistribution,
    SimulatedWorld,
    SlateSettings,
    WorldSettings,
    slate_value,
)
from offtower.retrieval import (
    ExportOptions,
    Retriever,
    decisions_table,
    export_run,
    served_schema,
)
from offtower.training.run import train_run

_START = datetime(2026, 2, 1, tzinfo=UTC)
_JOIN = JoinPlan((("round_id", "round_id"), ("position", "position")), (JoinedReward("reward"),))
_USERS = 2_000
_NOT_RESULTS = ("json", "seeds")


class Relearning:
    """One seed: a world, and the logs so far."""

    def __init__(self, args: argparse.Namespace, seed: int, folder: Path) -> None:
        self.args, self.seed, self.folder = args, seed, folder
        self.world = SimulatedWorld(
            args.items,
            WorldSettings(args.dim, args.dim, args.dim, n_users=_USERS),
            seed=seed,
            logging=LoggingPolicy("popularity", epsilon=0.5),
            slate=None if args.slate == 1 else SlateSettings(args.slate),
        )
        schema = self.world.catalogue_schema
        write_catalogue(folder / "catalogue", self.world.catalogue_table(), schema)
        self.logs = [folder / "log-0"]
        write_log(self.logs[0], self.world.log(args.rounds_logged, seed=1), self.world.log_schema)
        self.test_contexts = self.world.contexts(args.contexts, seed=0)

    def round(self, number: int) -> float:
        """Learn from all logs, serve, log. Returns the true value of the served policy."""
        retriever = self.learn(number)
        self.serve(retriever, number)
        return self.value(retriever)

    def learn(self, number: int) -> Retriever:
        args, log = self.args, self.folder / f"train-{number}"
        schema = self.world.log_schema
        write_log(log, self.rows(schema), schema)
        tower = {"hidden_layer_sizes": [args.hidden]}
        config = parse_config(
            {
                "name": f"round-{number}",
                "runs": str(self.folder / "runs"),
                "seed": self.seed,
                "data": {"train": str(log), "catalogue": str(self.folder / "catalogue")},
                "policy": {"embedding_dim": 16, "context_tower": tower, "item_tower": tower},
                "objective": {"name": args.objective},
                "serving": {"k": args.slate, "uniform": args.uniform},
                "training": {
                    "epochs": args.epochs,
                    "batch_size": args.batch_size,
                    "learning_rate": args.learning_rate,
                },
            }
        )
        train_run(config)
        options = ExportOptions(index=None, onnx=False, parquet=False, contexts=100, kept=1)
        export_run(config.run_directory, options)
        return Retriever.open(config.run_directory)

    def rows(self, schema: LogSchema) -> Iterator[pa.Table]:
        """The rows of all logs so far, with the columns and types of the first."""
        types: pa.Schema | None = None
        for log in self.logs:
            for table in ParquetLog.open(log).tables():
                table = table.select(list(schema.columns))
                types = types or table.schema
                yield table.cast(types)

    def serve(self, retriever: Retriever, number: int) -> None:
        """Serve new contexts, draw their rewards and ingest the log."""
        args, world = self.args, self.world
        rng = np.random.default_rng([self.seed, number])
        contexts = world.contexts(args.rounds_logged, seed=number)
        users = pa.array(rng.integers(_USERS, size=args.rounds_logged))
        contexts = contexts.append_column("user_id", users)
        served = retriever.sample(contexts, args.slate, seed=rng)
        at = _START + timedelta(days=number)
        decisions = decisions_table(retriever, contexts, served, served_at=at)
        reward = world.draw_slate_rewards(contexts, served.item, rng)
        outcomes = decisions.select(["round_id", "position"])
        outcomes = outcomes.append_column("reward", pa.array(reward.reshape(-1)))
        source = self.folder / f"served-{number}.parquet"
        pq.write_table(join_tables(decisions, outcomes, _JOIN), source)
        taken = ingest_files(
            IngestSource(
                source,
                served_schema(retriever),
                self.folder / "catalogue" / "part-00000.parquet",
                world.catalogue_schema,
            ),
            self.folder / f"ingested-{number}",
        )
        self.logs.append(Path(str(taken.log)))

    def value(self, retriever: Retriever) -> float:
        """The true value of the served policy."""
        world, uniform = self.world, self.args.uniform
        items = torch.from_numpy(np.array(retriever.vectors))

        def embed(contexts: pa.Table) -> torch.Tensor:
            return torch.from_numpy(retriever.embed(contexts))

        if world.slate is None:
            rewards = world.policy_rewards(self.test_contexts, embed, items)
            over_all = world.uniform_rewards(self.test_contexts)
            return float(((1.0 - uniform) * rewards + uniform * over_all).mean())
        policy = world.two_tower(embed, items, served=ServedDistribution(uniform=uniform))
        return slate_value(world, policy, self.test_contexts).value


def summary(values: NDArray[np.float64]) -> dict[str, Any]:
    """Of (seeds, rounds) values."""

    def z(difference: NDArray[np.float64]) -> float:
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        return float(difference.mean() / error) if error > 0.0 else float("nan")

    steps = np.diff(values, axis=1)
    return {
        "mean_by_round": values.mean(axis=0).tolist(),
        "gain": float((values[:, -1] - values[:, 0]).mean()),
        "gain_in_standard_errors": z(values[:, -1] - values[:, 0]),
        "largest_fall_in_standard_errors": min(z(step) for step in steps.T),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10, help="times of learning and serving")
    parser.add_argument("--rounds-logged", type=int, default=4_000, help="rounds of each log")
    parser.add_argument("--slate", type=int, default=1, help="items of a round")
    parser.add_argument("--uniform", type=float, default=0.1, help="share of uniform draws")
    parser.add_argument("--objective", default="weighted_likelihood")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--dim", type=int, default=6)
    parser.add_argument("--contexts", type=int, default=500, help="on which values are computed")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    settings = {key: str(value) for key, value in vars(args).items() if key not in _NOT_RESULTS}
    values, seconds = earlier_seeds(args.json, settings)
    for seed in range(len(values), args.seeds):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            loop = Relearning(args, seed, Path(folder))
            values.append([loop.round(number + 1) for number in range(args.rounds)])
        seconds.append(time.perf_counter() - began)
        print(
            f"seed {seed}: {np.round(values[seed], 4).tolist()} in {seconds[-1]:.0f} s", flush=True
        )
        found = summary(np.array(values)) if len(values) > 1 else {}
        result = {"arguments": settings, "values": values, "seconds": seconds, **found}
        if args.json:
            unfinished = args.json.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(result, indent=2) + "\n")
            unfinished.rename(args.json)
    if len(values) > 1:
        print(json.dumps(summary(np.array(values)), indent=2))


def earlier_seeds(
    path: Path | None, settings: dict[str, str]
) -> tuple[list[list[float]], list[float]]:
    """Values and seconds of the seeds that `path` holds of the same settings."""
    if path is None or not path.exists():
        return [], []
    found = json.loads(path.read_text())
    if found["arguments"] != settings:
        raise SystemExit(f"'{path}' holds results of other settings: {found['arguments']}")
    return found["values"], found["seconds"]


if __name__ == "__main__":
    main()
