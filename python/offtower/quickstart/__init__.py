"""Ingest, train and evaluate end to end on included data: `offtower quickstart`.

The real log is the Open Bandit Dataset sample of the obp package (men campaign, both logging
policies). The synthetic log has known true values. On each, policies are trained with the
objectives auto (the default), regression, IPS and DR, and evaluated on held-out rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from offtower.atomic import write_text
from offtower.config import Config, parse_config
from offtower.data import ParquetLog, validate_log, write_catalogue, write_log
from offtower.data.convert import from_bandit_feedback
from offtower.data.encoding import to_tensors
from offtower.data.ingest import Split, ingest_open_bandit
from offtower.data.simulate import ObpWorld
from offtower.errors import DataError, RunError
from offtower.evaluation.report import write_report
from offtower.evaluation.run import LogEvaluation, evaluate_runs
from offtower.execution import Execution
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.training.run import train_run
from offtower.training.trainer import EpochHook

OBJECTIVES = ("auto", "regression", "ips", "dr")
_MARK = "quickstart.json"
_TRUTH_CONTEXTS = 5000
_WORLD = 142
"""Seed of a world in which no single item is close to the best policy."""


@dataclass
class QuickstartResult:
    """The evaluations of both logs and the path of the report."""

    evaluations: list[LogEvaluation]
    report: Path


def run_quickstart(out: Path, progress: Progress, say: Callable[[str], None]) -> QuickstartResult:
    """Ingest, validate, train and evaluate; write everything below `out`, which is emptied first.

    Raises:
        RunError: `out` is not empty and was not written by the quickstart.
        DataError: The ingested log has errors.
    """
    _begin(out)
    say("Open Bandit Dataset, men campaign: reading the sample")
    configs = _configs("open_bandit", _open_bandit(out / "data" / "open-bandit", say), out)
    title = "Open Bandit Dataset, men campaign"
    execution = Execution(progress=progress)
    evaluations = [_train_and_evaluate(title, configs, execution, say)]
    say("Synthetic log: 10 actions, true value known")
    folder, world = _synthetic(out / "data" / "synthetic")
    configs = _configs("synthetic", folder, out)
    title = "Synthetic log, 10 actions"
    evaluations.append(_train_and_evaluate(title, configs, execution, say, world))
    report = write_report(
        out / "report.html", evaluations, title="offtower quickstart", command="offtower quickstart"
    )
    return QuickstartResult(evaluations, report)


def _begin(out: Path) -> None:
    """Empty the folder of an earlier quickstart; refuse any other folder with content."""
    if out.exists() and any(out.iterdir()):
        if not (out / _MARK).exists():
            raise RunError(
                f"'{out}' is not empty and was not written by quickstart; choose another --out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / _MARK, json.dumps({"made_by": "offtower quickstart"}))


def _open_bandit(folder: Path, say: Callable[[str], None]) -> Path:
    summary = ingest_open_bandit("men", folder, split=Split("time"))
    say(f"  {summary.rows:,} impressions of {summary.items} items")
    _validate(folder, say)
    return folder


def _validate(folder: Path, say: Callable[[str], None]) -> None:
    from offtower.data import Catalogue

    report = validate_log(ParquetLog.open(folder / "log"), Catalogue.open(folder / "catalogue"))
    for finding in report.findings:
        if finding.level != "info":
            say(f"  {finding.level}: {finding.message}")
    if not report.ok:
        raise DataError(f"the log at '{folder}' has errors; see above")


def _synthetic(folder: Path) -> tuple[Path, ObpWorld]:
    world = ObpWorld(n_actions=10, dim_context=5, dim_action_context=5, beta=1.0, seed=_WORLD)
    for seed, (name, rounds) in enumerate(
        {"train": 5000, "validation": 2500, "test": 5000}.items(), start=1
    ):
        log, catalogue = from_bandit_feedback(world.sample(rounds, seed))
        table = log.read_row_group(0)
        # Expected rewards and logging probabilities are not available to training and evaluation.
        table = table.drop_columns(
            [c for c in ("expected_reward", "pi_b") if c in table.column_names]
        )
        write_log(folder / name, [table], log.schema)
        if name == "train":
            write_catalogue(folder / "catalogue", catalogue.table(0, 10), catalogue.schema)
    return folder, world


def _train_and_evaluate(
    title: str,
    configs: list[Config],
    execution: Execution,
    say: Callable[[str], None],
    world: ObpWorld | None = None,
) -> LogEvaluation:
    for config in configs:
        result = train_run(
            config,
            execution=execution,
            hook=None if world is None else lambda data: _truth_hook(world, data),
        )
        say(f"  {config.objective.name}: {result.epochs} epochs, {result.steps:,} steps")
    return evaluate_runs(
        [config.run_directory for config in configs],
        title=title,
        execution=execution,
        truth=None if world is None else _truth(world),
        baselines=None if world is None else _baselines(world),
    )


def _configs(template: str, folder: Path, out: Path) -> list[Config]:
    return [_config(template, objective, folder, out) for objective in OBJECTIVES]


def _config(template: str, objective: str, folder: Path, out: Path) -> Config:
    text = resources.files("offtower.quickstart").joinpath(f"{template}.yaml").read_text("utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    content["runs"] = str(out / content["name"])
    content["name"] = objective
    content["objective"] = {"name": objective}
    for key, value in content["data"].items():
        content["data"][key] = str(folder / Path(value).name)
    return parse_config(content, source=f"{template}.yaml")


def _truth(world: ObpWorld) -> Callable[[TwoTowerPolicy, Any], dict[str, float]]:
    """Return a function for the true values of a policy and its greedy policy on new contexts."""
    feedback = world.sample(_TRUTH_CONTEXTS, seed=99)
    expected = feedback["expected_reward"]
    log, _ = from_bandit_feedback(feedback)
    table = log.read_row_group(0)

    def value(policy: TwoTowerPolicy, items: Any) -> dict[str, float]:
        with torch.no_grad():
            u = policy.embed_contexts(to_tensors(policy.context_encoding.encode(table)))
            embedded = policy.embed_items(items)
            logits = (u @ embedded.embedding.T / policy.temperature).double()
            if embedded.bias is not None:
                logits = logits + embedded.bias
            pi = torch.softmax(logits, dim=1).numpy()
        greedy = expected[np.arange(len(expected)), pi.argmax(1)]
        return {
            "true_value": float((pi * expected).sum(1).mean()),
            "true_value_greedy": float(greedy.mean()),
        }

    return value


def _baselines(world: ObpWorld) -> dict[str, float]:
    expected = world.sample(_TRUTH_CONTEXTS, seed=99)["expected_reward"]
    return {
        "best possible policy": float(expected.max(axis=1).mean()),
        "best fixed item": float(expected.mean(axis=0).max()),
    }


def _truth_hook(world: ObpWorld, data: PreparedData) -> EpochHook:
    value = _truth(world)
    return lambda policy, epoch: value(policy, data.items)
