"""Runs that made logs together, and their evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.catalogue import Catalogue
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.simulate import LoggingPolicy, SimulatedWorld, WorldSettings, multi_policy_log
from offtower.evaluation.accumulators import EvaluationAccumulators
from offtower.evaluation.behavior.plan import BehaviorPlan
from offtower.evaluation.evaluator import EvaluationPlan, Evaluator
from offtower.evaluation.run import LogEvaluation, evaluate_runs
from offtower.evaluation.run_loading import open_run, with_overrides
from offtower.evaluation.samples import joined
from offtower.evaluation.scoring.batches import LogSource
from offtower.evaluation.selection import BehaviorPolicies
from offtower.execution import LOCAL
from offtower.progress import Progress
from offtower.run_directory import RunDirectory
from offtower.training.run import train_run

from .test_runs import of_policy

ITEMS = 12


BETAS = {"cautious": -1.0, "keen": 2.0}


def renamed(table: pa.Table, name: object) -> pa.Table:
    place = table.schema.get_field_index("behavior_policy")
    return table.set_column(place, "behavior_policy", pa.array([name] * table.num_rows))


def make_runs(folder: Path) -> None:
    """Runs `a` and `b`; `served`, a log that both made; `drawn`, one of two simulated policies."""
    world = SimulatedWorld(
        ITEMS, WorldSettings(4, 4, 4, feature_kinds="all", intercept=0.0), seed=3
    )
    write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
    # From this log run `a` learns a policy that supports all of b: by enumeration its weights have
    # a mean square of 1.7, so that standard errors hold, and none of b's mass is hidden.
    write_log(folder / "train", world.log(1500, seed=1), world.log_schema)
    several = {name: LoggingPolicy(beta=beta, epsilon=0.2) for name, beta in BETAS.items()}
    write_log(folder / "drawn", multi_policy_log(world, 2001, 1, several), world.log_schema, 300)
    for name, objective in (("a", "ips"), ("b", "regression")):
        train_run(
            parse_config(
                {
                    "name": name,
                    "runs": str(folder),
                    "data": {
                        "train": str(folder / "train"),
                        "catalogue": str(folder / "catalogue"),
                    },
                    "policy": {"embedding_dim": 4, "temperature": 0.5},
                    "reward_model": {
                        "kind": "factored",
                        "embedding_dim": 4,
                        "folds": 1,
                        "epochs": 2,
                    },
                    "objective": {"name": objective},
                    "training": {"epochs": 2, "batch_size": 64, "threads": 1},
                    "evaluation": {"selection": {"models": ["linear"]}},
                }
            )
        )
    catalogue = Catalogue.open(folder / "catalogue")
    parts = []
    with torch.no_grad():
        for rows, name in ((700, "a"), (600, "b")):
            policy = open_run(folder / name, catalogue).policy
            (folder / f"of_{name}").mkdir()
            made = of_policy(world, policy, catalogue, rows, folder / f"of_{name}")
            parts += [renamed(table, f"run-{name}") for table in made]
    table = pa.concat_tables(parts)
    mixed = table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows)))
    write_log(folder / "served", [mixed], world.log_schema, 256)


def runs_option(place: Path, a: str = "a", b: str = "b") -> str:
    return f"evaluation.selection.logging_runs={{run-a: {place / a}, run-b: {place / b}}}"


def evaluate(
    place: Path, *overrides: str, select: str | None = "heuristic", log: str = "served"
) -> LogEvaluation:
    return evaluate_runs([place / "b"], overrides=overrides, select=select, log=place / log)


def behavior(
    place: Path, *overrides: str, log: str = "served", backwards: bool = False
) -> BehaviorPolicies:
    """What is measured on a log for the heuristic, in batches that cut its row groups.

    backwards: from the last batch to the first.
    """
    catalogue = Catalogue.open(place / "catalogue")
    config = with_overrides(RunDirectory(place / "a").load_config(), overrides)
    opened = ParquetLog.open(place / log)
    run = open_run(place / "a", catalogue)
    encoding = run.policy.context_encoding
    source = LogSource(opened, catalogue, config.evaluation.batch_rows)
    plan = BehaviorPlan.of("heuristic", source, config, run)
    assert plan.heuristic is not None
    batches = list(enumerate(scan(opened, catalogue, encoding, 190)))
    found = [
        plan.heuristic.measure(number, rows, [rows] * len(plan.encodings), {})
        for number, rows in (reversed(batches) if backwards else batches)
    ]
    return joined(found[::-1] if backwards else found)


def streamed(
    place: Path, select: str, *overrides: str
) -> tuple[Evaluator, EvaluationPlan, EvaluationAccumulators]:
    """Run `b` evaluated on the log that both runs made, with all that was accumulated."""
    catalogue = Catalogue.open(place / "catalogue")
    config = with_overrides(RunDirectory(place / "b").load_config(), overrides)
    runs = (open_run(place / "b", catalogue),)
    evaluator = Evaluator(runs, ParquetLog.open(place / "served"), catalogue, config)
    plan = evaluator.plan(select, Progress())
    return evaluator, plan, evaluator.run(plan, LOCAL)[1]


def columns_option(cautious: str = "pscore_cautious", keen: str = "pscore_keen") -> str:
    return f"evaluation.selection.logging_columns={{cautious: {cautious}, keen: {keen}}}"
