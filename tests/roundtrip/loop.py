"""Serve from a trained run, log, ingest and evaluate, in one process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from offtower.config import ServingConfig, parse_config
from offtower.config.evaluation import EstimatorConfig
from offtower.data import Catalogue, ParquetLog, write_catalogue, write_log
from offtower.data.columns import as_float_array
from offtower.data.ingest import IngestSource, ingest_files
from offtower.data.join import JoinedReward, JoinPlan, join_tables
from offtower.data.rounds import Rounds
from offtower.data.simulate import (
    EligibilitySettings,
    LoggingPolicy,
    ServedDistribution,
    SimulatedWorld,
    SlateSettings,
    WorldSettings,
)
from offtower.evaluation.evaluator import Evaluator
from offtower.evaluation.run_loading import open_run
from offtower.execution import LOCAL
from offtower.progress import Progress
from offtower.retrieval import (
    ExportOptions,
    Retriever,
    SampleResult,
    decisions_table,
    export_run,
    served_schema,
)
from offtower.retrieval.propensity_sampler import Mode
from offtower.retrieval.retriever import Filter
from offtower.training.run import train_run
from tests.lighter import without_graphs

START = datetime(2026, 1, 3, 12, 0, tzinfo=UTC)
_PLAN = JoinPlan((("round_id", "round_id"), ("position", "position")), (JoinedReward("reward"),))


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found on a served log of n rounds of k items."""

    weight: np.ndarray
    """(n, k) importance weights: products over the positions down to each; 1 beyond the end of a
    shorter round."""
    rewards: np.ndarray
    """(n, k); 0 beyond the end of a shorter round."""
    values: dict[str, float]
    """Estimates by estimator."""
    logging_value: float
    """Of the logging policy, from the log alone."""


@dataclass(frozen=True, eq=False)
class Loop:
    """A world, a run trained in it and its export.

    The towers are those of a short training; a configuration's temperature sets the perplexity.
    """

    world: SimulatedWorld
    folder: Path
    run: Path
    retriever: Retriever

    @classmethod
    def make(
        cls,
        folder: Path,
        items: int,
        eligible: EligibilitySettings | None,
        slate: SlateSettings | None = None,
    ) -> Loop:
        """Train for an epoch on a log of the world, and export.

        slate: of the world; by default none, or 10 items where the forms must leave as many.
        """
        if slate is None and eligible is not None:
            slate = SlateSettings(min(10, items // 2))
        settings = WorldSettings(16, 16, 4, intercept=0.0, n_users=50)
        world = SimulatedWorld(
            items,
            settings,
            seed=items,
            logging=LoggingPolicy(epsilon=0.5),
            slate=slate,
            eligible=eligible,
        )
        log, schema = world.log(400, seed=1), world.log_schema
        if world.slate is not None:
            # One row a round for training.
            schema = replace(schema, position=None, round_id=None, pscore_kind=None)
            log = (t.filter(pa.array(t["position"].to_numpy() == 0)) for t in log)
        write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
        write_log(folder / "train", log, schema)
        config = parse_config(
            {
                "name": "served",
                "runs": str(folder / "runs"),
                "data": {"train": str(folder / "train"), "catalogue": str(folder / "catalogue")},
                "policy": {
                    "embedding_dim": 16,
                    "item_bias": True,
                    "temperature": 0.1,
                    "context_tower": {"hidden_layer_sizes": [], "normalize": True},
                    "item_tower": {"hidden_layer_sizes": [], "normalize": True},
                },
                "objective": {"name": "weighted_likelihood"},
                "training": {"epochs": 1, "learning_rate": 0.01, "threads": 1},
            }
        )
        train_run(config)
        options = ExportOptions(
            index=None,
            parquet=False,
            contexts=100,
        )
        with without_graphs():
            export_run(config.run_directory, options)
        return cls(world, folder, config.run_directory, Retriever.open(config.run_directory))

    @cached_property
    def catalogue(self) -> Catalogue:
        return Catalogue.open(self.folder / "catalogue")

    def contexts(self, n: int, seed: int) -> pa.Table:
        """n contexts with user ids; times are those of serving."""
        table = self.world.contexts(n, seed)
        users = np.random.default_rng(seed).integers(50, size=n)
        return table.append_column("user_id", pa.array(users))

    def scores(self, contexts: pa.Table) -> np.ndarray:
        """(n, N) logits of the trained policy in float64, from the exported vectors."""
        queries = self.retriever.embed(contexts).astype(np.float64)
        found: np.ndarray = queries @ np.asarray(self.retriever.vectors, dtype=np.float64).T
        return found

    def mask(self, contexts: pa.Table) -> np.ndarray | None:
        """(n, N) eligible items, by the world; None where all are."""
        return None if self.world.eligible is None else self.world.eligible.mask(contexts)

    def temperature(self, perplexity: float) -> float:
        """The serving temperature at which the softmax has this perplexity, exp of its mean
        entropy over all items."""
        scores = self.scores(self.contexts(50, seed=999))
        low, high = -12.0, 12.0
        for _ in range(40):
            middle = (low + high) / 2
            log_prob = ServedDistribution(float(np.exp(middle))).log_prob(scores)
            entropy = -(np.exp(log_prob) * np.maximum(log_prob, -1e4)).sum(axis=1).mean()
            low, high = (middle, high) if entropy < np.log(perplexity) else (low, middle)
        return float(np.exp(low))

    def serving(self, serving: ServingConfig) -> Retriever:
        """A retriever of the same export that serves otherwise."""
        manifest = {**self.retriever.manifest, "serving": dataclasses.asdict(serving)}
        return Retriever(self.retriever.directory, manifest)

    def log(self, contexts: pa.Table, decisions: pa.Table, served: SampleResult, seed: int) -> Path:
        """Draw the rewards of shown items (n, k), join them and ingest the log."""
        items = served.item
        k = items.shape[1]
        world, rng = self.world, np.random.default_rng(seed)
        latent = world.context_latent(contexts)
        logit = torch.einsum("bl,bkl->bk", latent, world.item_latent[items])
        logit = (logit + world.item_logit[items]).numpy()
        reward = SlateSettings(k).draw(logit, world.settings.intercept, "binary", rng)
        outcomes = decisions.select(["round_id", "position"])
        rows = decisions.num_rows
        outcomes = outcomes.append_column("reward", pa.array(reward[items >= 0]))
        shuffled = outcomes.take(pa.array(rng.permutation(rows)))
        source = self.folder / f"served-{seed}.parquet"
        pq.write_table(join_tables(decisions, shuffled, _PLAN), source)
        taken = ingest_files(
            IngestSource(
                source,
                served_schema(self.retriever, served),
                self.folder / "catalogue" / "part-00000.parquet",
                self.world.catalogue_schema,
            ),
            self.folder / f"taken-{seed}",
        )
        assert taken.rows == rows and taken.quarantined == 0
        return Path(str(taken.log))

    def evaluate(self, log: Path, serving: ServingConfig, k: int) -> Evaluated:
        """Evaluate the run as served by `serving` on a log."""
        opened = open_run(self.run, self.catalogue)
        evaluation = replace(opened.config.evaluation, estimators=[EstimatorConfig("ips")])
        config = replace(opened.config, serving=serving, evaluation=evaluation)
        run = replace(opened, config=config)
        parquet = ParquetLog.open(log)
        evaluator = Evaluator((run,), parquet, self.catalogue, config)
        plan = evaluator.plan(None, Progress())
        name = next(iter(plan.scorer.policies))
        batches = list(plan.scorer.batches(range(plan.scorer.source.num_batches)))
        weight = np.concatenate([batch.rows[name].importance_weight for batch in batches])
        result, _ = evaluator.run(plan, LOCAL)
        estimates = result.policies[name].estimates
        rewards = np.concatenate([as_float_array(t.column("reward")) for t in parquet.tables()])
        rounds = Rounds.of_positions(
            np.concatenate([t.column("position").to_numpy() for t in parquet.tables()])
        )
        grids = np.ones((len(rounds), k)), np.zeros((len(rounds), k))
        for grid, column in zip(grids, (weight, rewards), strict=True):
            grid[rounds.number, rounds.position] = column
        return Evaluated(
            *grids,
            {key: one.estimate.value for key, one in estimates.items()},
            result.logging.estimate.value,
        )


def at_time(contexts: pa.Table, seed: int) -> tuple[pa.Table, datetime]:
    """The contexts of one moment of serving."""
    at = START + timedelta(days=int(seed % 20))
    if "timestamp" not in contexts.column_names:
        return contexts, at
    times = pa.array(np.full(contexts.num_rows, at.replace(tzinfo=None), dtype="datetime64[us]"))
    column = contexts.column_names.index("timestamp")
    return contexts.set_column(column, "timestamp", times), at


@dataclass(frozen=True)
class ServedLog:
    """The contexts (n) of a served log, what was shown, and where the ingested log is."""

    contexts: pa.Table
    served: SampleResult
    log: Path


def served_log(
    loop: Loop,
    serving: ServingConfig,
    *,
    rounds: int,
    seed: int,
    mode: Mode = "exact",
    exclude: Filter | None = None,
) -> ServedLog:
    """Serve, log and ingest."""
    contexts, at = at_time(loop.contexts(rounds, seed), seed)
    retriever = loop.serving(serving)
    served = retriever.sample(contexts, serving.k, seed=seed, mode=mode, exclude=exclude)
    decisions = decisions_table(retriever, contexts, served, served_at=at)
    return ServedLog(contexts, served, loop.log(contexts, decisions, served, seed))
