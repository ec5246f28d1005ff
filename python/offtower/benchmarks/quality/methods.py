"""What is compared: each takes a world and a seed, never its truth, and gives a policy."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from offtower.benchmarks.quality.misspecified import (
    half_blind_policy,
    half_blind_settings,
    half_blind_towers,
)
from offtower.benchmarks.quality.revealed import best_of_revealed
from offtower.benchmarks.quality.world import QualityWorld, Value, of_scores, value
from offtower.config import parse_config
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.data.convert import to_bandit_feedback
from offtower.data.log import TableLog
from offtower.data.simulate.features import vector_matrix
from offtower.evaluation.intervals import simultaneous_confidence
from offtower.objectives import OBJECTIVES
from offtower.prepare import PreparedData, prepare
from offtower.progress import Progress
from offtower.training.auto import train_auto
from offtower.training.run import build_trainer
from offtower.training.tune import DEFAULT_SPACE, draw_trials, trial_config


class NotForThisWorld(Exception):
    """The method has no meaning there; the message says why."""


@dataclass(frozen=True)
class Learned:
    """What a method ended with."""

    value: Value
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


Method = Callable[[QualityWorld, int], Learned]

DOCUMENT_STEPS = 20_000
"""Most steps of a document's method: 200 passes over up to 3,200 rows, fewer over longer logs."""


def document(objective: str) -> Method:
    """A plain training loop: towers 30-30-30 with ELU, embeddings of 10, Adam 0.005 with L2 1e-6,
    batches of 32 in the order of the log, 200 passes, a reward model fitted and read on the same
    rows, temperature 1, the last weights."""

    def learn(world: QualityWorld, seed: int) -> Learned:
        rows = world.log.num_rows
        epochs = max(1, min(200, DOCUMENT_STEPS * 32 // rows))
        return _trained(
            world,
            seed,
            policy=_towers([30, 30, 30], 10),
            reward_model={
                "kind": "factored" if objective == "dr" else "none",
                "embedding_dim": 10,
                "tower": {"hidden_layer_sizes": [30, 30, 30]},
                "folds": 1,
                "weight_decay": 0.0,
            },
            objective={"name": objective},
            training={
                "epochs": epochs,
                "batch_size": 32,
                "optimizer": "adam",
                "learning_rate": 0.005,
                "weight_decay": 1e-6,
                "gradient_clip": None,
                "shuffle": False,
            },
        )

    return learn


def product(objective: str, **arguments: Any) -> Method:
    """One objective with the settings of `TwoTowerPolicyLearner`; a cross-fitted factored reward
    model where it needs one; the last weights."""

    def learn(world: QualityWorld, seed: int) -> Learned:
        rows = world.log.num_rows
        needs_model = OBJECTIVES[objective].requirements.reward_model
        return _trained(
            world,
            seed,
            policy=_towers([64, 64], 32),
            reward_model={"kind": "factored" if needs_model else "none"},
            objective={"name": objective, "arguments": arguments},
            training={
                "epochs": 50 if rows <= 10_000 else 20,
                "batch_size": 256 if rows <= 10_000 else 1024,
                "learning_rate": 3e-3,
            },
        )

    return learn


def auto(world: QualityWorld, seed: int, **settings: Any) -> Learned:
    """The default: objective=auto, nothing set."""
    data = _prepared(world)
    config = parse_config(
        {
            "name": "auto",
            "seed": seed,
            "data": {"train": "memory", "catalogue": "memory"},
            "auto": settings,
        }
    )
    began = time.perf_counter()
    found = train_auto(config, data)
    seconds = time.perf_counter() - began
    facts: dict[str, Any] = {
        "chosen": found.report["chosen"],
        "estimate": found.report["value"],
        "low": found.report["low"],
    }
    from offtower.training.auto.ensemble import join

    for name, best in found.choice.best.items():
        # What each candidate would have been worth: known to the benchmark, not to the choice.
        members = found.members[name]
        of_candidate = value(world, join(members, best.inverse_temperature), data.items)
        facts[f"value of {name}"] = of_candidate.softmax
    return Learned(value(world, found.policy, data.items), seconds, facts)


TRIALS = 12
"""Of the method `tune`."""


def tuned(world: QualityWorld, seed: int) -> Learned:
    """`offtower tune` without a run directory: 12 trials of its default space on 70 % of the log,
    chosen by the lower bound on the other rows."""
    rows = world.log.num_rows
    order = np.random.default_rng([seed, 11]).permutation(rows)
    cut = int(0.7 * rows)
    parts = [
        TableLog(world.log.table.take(order[part]), world.log.schema)
        for part in (slice(0, cut), slice(cut, rows))
    ]
    data = prepare(parts[0], parts[1], world.catalogue, Progress())
    base = parse_config(
        {
            "name": "tune",
            "seed": seed,
            "data": {"train": "memory", "catalogue": "memory", "validation": "memory"},
            "training": {
                "epochs": 30,
                "batch_size": max(64, min(1024, rows // 16)),
                "log_every_steps": None,
                "measure_terms": False,
            },
        }
    )
    confidence = simultaneous_confidence(base.evaluation.confidence, TRIALS)
    began = time.perf_counter()
    trials: list[tuple[float, Value]] = []
    spent = 0.0
    for number, overrides in enumerate(draw_trials(DEFAULT_SPACE, TRIALS, seed)):
        config = trial_config(base, number, overrides, confidence)
        model = obtain_reward_model(config.reward_model, data, config.seed, Progress())
        trainer = build_trainer(config, data, model)
        low = trainer.fit().validation
        valued = time.perf_counter()
        trials.append((-np.inf if low is None else low, value(world, trainer.policy, data.items)))
        spent += time.perf_counter() - valued
    seconds = time.perf_counter() - began - spent
    low, found = max(trials, key=lambda trial: trial[0])
    facts = {f"value of trial {k}": one.softmax for k, (_, one) in enumerate(trials)}
    return Learned(found, seconds, {"low": low, **facts})


def logistic_cv(world: QualityWorld, seed: int) -> Learned:
    """scikit-learn's cross-validated logistic regression on all interactions, acting greedily."""
    from sklearn.linear_model import LogisticRegressionCV

    _needs_vectors(world)
    began = time.perf_counter()
    log = to_bandit_feedback(world.log, world.catalogue)
    if not 0.0 < log["reward"].mean() < 1.0 or len(np.unique(log["reward"])) > 2:
        raise NotForThisWorld("needs binary rewards")
    items = _with_one(log["action_context"])

    def pairs(context: np.ndarray, item: np.ndarray) -> np.ndarray:
        return (context[:, :, None] * item[:, None, :]).reshape(len(context), -1)

    model = LogisticRegressionCV(Cs=10, cv=5, scoring="neg_log_loss", max_iter=500)
    with warnings.catch_warnings():
        # Of a release that renames attributes that are not read here.
        warnings.simplefilter("ignore", FutureWarning)
        model.fit(pairs(_with_one(log["context"]), items[log["action"]]), log["reward"])
    seconds = time.perf_counter() - began
    weight = model.coef_[0].reshape(log["context"].shape[1] + 1, items.shape[1])
    column = world.truth.contexts.column(world.log.schema.context[0].source).combine_chunks()
    contexts = _with_one(vector_matrix(column, log["context"].shape[1]).astype(np.float64))
    # Softmax so sharp that it is greedy but for ties.
    scores = torch.from_numpy(contexts @ weight @ items.T) * 1e6
    return Learned(of_scores(scores, world.truth.expected(0, len(contexts))), seconds)


def half_blind_regression(world: QualityWorld, seed: int) -> Learned:
    """Regression that sees every other feature of contexts and items, acting greedily."""
    _needs_vectors(world)
    found, seconds = half_blind_policy(world)
    return Learned(found, seconds)


def half_blind_dr(world: QualityWorld, seed: int) -> Learned:
    """DR whose reward model is that regression, for linear towers that see all features."""
    return _half_blind(
        world,
        seed,
        half_blind_settings(),
        {"name": "clipped_dr", "arguments": {"max_weight": 10.0}},
    )


def half_blind_potec(world: QualityWorld, seed: int) -> Learned:
    """POTEC whose second stage and clusters are from such a regression by two towers, and whose
    first has a linear tower that sees all features of contexts."""
    arguments = {"clusters": 10, "max_weight": 10.0}
    return _half_blind(world, seed, half_blind_towers(), {"name": "potec", "arguments": arguments})


def _half_blind(
    world: QualityWorld, seed: int, reward_model: dict[str, Any], objective: dict[str, Any]
) -> Learned:
    _needs_vectors(world)
    linear: dict[str, list[int]] = {"hidden_layer_sizes": []}
    return _trained(
        world,
        seed,
        policy={"embedding_dim": 8, "context_tower": linear, "item_tower": linear},
        reward_model=reward_model,
        objective=objective,
        training={
            "epochs": max(5, min(60, 400_000 // world.log.num_rows)),
            "batch_size": 256,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "decay": "linear",
        },
    )


def revealed_labels(world: QualityWorld, seed: int) -> Learned:
    """What regression can do with the labels that the log reveals, its settings chosen by the
    truth: a line to measure others by, not a method that anyone could use."""
    if world.landmarks.get("supervised") is None:
        raise NotForThisWorld("has no labels")
    found, settings, seconds = best_of_revealed(world)
    return Learned(found, seconds, settings)


METHODS: Mapping[str, Method] = {
    "auto": auto,
    "tune": tuned,
    "document_regression": document("regression"),
    "document_ips": document("ips"),
    "document_dr": document("dr"),
    "regression": product("regression"),
    "ips": product("ips"),
    "clipped_ips": product("clipped_ips", max_weight=10.0),
    "snips": product("snips"),
    "weighted_likelihood": product("weighted_likelihood"),
    "dr": product("dr"),
    "clipped_dr": product("clipped_dr", max_weight=10.0),
    "potec": product("potec", clusters=10, max_weight=10.0),
    "logistic_cv": logistic_cv,
    "half_blind_regression": half_blind_regression,
    "half_blind_dr": half_blind_dr,
    "half_blind_potec": half_blind_potec,
    "revealed_labels": revealed_labels,
}


def _needs_vectors(world: QualityWorld) -> None:
    if [spec.kind for spec in world.catalogue.schema.features] != ["vector"]:
        raise NotForThisWorld("needs one vector a context and one an item")


def _trained(world: QualityWorld, seed: int, **sections: Any) -> Learned:
    data = _prepared(world)
    config = parse_config(
        {
            "name": "method",
            "seed": seed,
            "data": {"train": "memory", "catalogue": "memory"},
            **sections,
            "training": {
                "log_every_steps": None,
                "measure_terms": False,
                **sections["training"],
            },
        }
    )
    began = time.perf_counter()
    model = obtain_reward_model(config.reward_model, data, seed, Progress())
    trainer = build_trainer(config, data, model)
    trainer.fit()
    seconds = time.perf_counter() - began
    return Learned(value(world, trainer.policy, data.items), seconds)


def _towers(hidden: list[int], dim: int) -> dict[str, Any]:
    tower = {"hidden_layer_sizes": hidden}
    return {"embedding_dim": dim, "context_tower": tower, "item_tower": tower}


def _prepared(world: QualityWorld) -> PreparedData:
    return prepare(world.log, None, world.catalogue, Progress())


def _with_one(matrix: np.ndarray) -> np.ndarray:
    return np.concatenate([matrix, np.ones((len(matrix), 1))], axis=1)
