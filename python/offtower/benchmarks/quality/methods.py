"""Learning methods to compare: each takes a world and a seed, and returns the learned value."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from offtower.benchmarks.quality.misspecified import (
    misspecified_policy,
    misspecified_settings,
    misspecified_towers,
)
from offtower.benchmarks.quality.revealed import best_of_revealed
from offtower.benchmarks.quality.world import QualityWorld, Value, value, value_of_scores
from offtower.config import Config, parse_config
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


class NotApplicable(Exception):
    """The method does not apply to this world; the message gives the reason."""


@dataclass(frozen=True)
class MethodResult:
    """The value of the learned policy, the training time and method-specific figures."""

    value: Value
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


Method = Callable[[QualityWorld, int], MethodResult]

PLAIN_STEPS = 20_000
"""Most steps of a plain training loop: 200 epochs of up to 3,200 rows, fewer of longer logs."""


def plain_loop(objective: str) -> Method:
    """Return a method with the settings of a plain training loop.

    Towers have hidden layers of 30, 30 and 30 units (ELU) and 10 outputs. Adam has learning rate
    0.005 and L2 penalty 1e-6. Batches of 32 follow the order of the log, for 200 epochs. The reward
    model is not cross-fitted. The last weights are used.
    """

    def learn(world: QualityWorld, seed: int) -> MethodResult:
        rows = world.log.num_rows
        epochs = max(1, min(200, PLAIN_STEPS * 32 // rows))
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


def learner_defaults(objective: str, **arguments: Any) -> Method:
    """Return a method with the default settings of `TwoTowerPolicyLearner`.

    Objectives that need a reward model get a cross-fitted factored one. The last weights are used.
    """

    def learn(world: QualityWorld, seed: int) -> MethodResult:
        rows = world.log.num_rows
        needs_model = OBJECTIVES[objective].requirements.reward_model
        return _trained(
            world,
            seed,
            policy=_towers(None, 32),
            reward_model={"kind": "factored" if needs_model else "none"},
            objective={"name": objective, "arguments": arguments},
            training={
                "epochs": 50 if rows <= 10_000 else 20,
                "batch_size": 256 if rows <= 10_000 else 1024,
                "learning_rate": 3e-3,
            },
        )

    return learn


def auto(world: QualityWorld, seed: int, **settings: Any) -> MethodResult:
    """Train with objective=auto and default settings."""
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
        "keep_logging": found.report["keep_logging"],
        "reward_range": list(world.log.schema.reward_range),
    }
    from offtower.training.auto.ensemble import join

    for name, best in found.choice.best.items():
        # True values of the candidates, which auto cannot use for its choice.
        base = 1.0 if name in found.rows.based else None
        policy = join(found.members[name], best.inverse_temperature, base)
        of_candidate = value(world, policy, data.items)
        facts[f"value of {name}"] = of_candidate.softmax
    return MethodResult(value(world, found.policy, data.items), seconds, facts)


TRIALS = 12
"""Number of trials of the method `tune`."""


def search_inputs(world: QualityWorld, seed: int) -> tuple[PreparedData, Config]:
    """Return the log of a world, 70 % of its rows for training, and a search's base settings."""
    rows = world.log.num_rows
    order = np.random.default_rng([seed, 11]).permutation(rows)
    cut = int(0.7 * rows)
    train, held_out = (
        TableLog(world.log.table.take(order[part]), world.log.schema)
        for part in (slice(0, cut), slice(cut, rows))
    )
    config = parse_config(
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
    return prepare(train, held_out, world.catalogue, Progress()), config


def tuned(world: QualityWorld, seed: int) -> MethodResult:
    """Tune as `offtower tune` does: 12 trials of the default search space on 70 % of the log.

    The trial with the highest lower confidence bound on the other rows is chosen; none is stopped
    early.
    """
    data, base = search_inputs(world, seed)
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
    return MethodResult(found, seconds, {"low": low, **facts})


def logistic_cv(world: QualityWorld, seed: int) -> MethodResult:
    """The greedy policy of scikit-learn's LogisticRegressionCV on all pairwise interactions."""
    from sklearn.linear_model import LogisticRegressionCV

    _needs_vectors(world)
    began = time.perf_counter()
    log = to_bandit_feedback(world.log, world.catalogue)
    if not 0.0 < log["reward"].mean() < 1.0 or len(np.unique(log["reward"])) > 2:
        raise NotApplicable("needs binary rewards")
    items = _with_one(log["action_context"])

    def pairs(context: np.ndarray, item: np.ndarray) -> np.ndarray:
        products: np.ndarray = context[:, :, None] * item[:, None, :]
        return products.reshape(len(context), -1)

    model = LogisticRegressionCV(Cs=10, cv=5, scoring="neg_log_loss", max_iter=500)
    with warnings.catch_warnings():
        # Some releases warn that attributes not used here will be renamed.
        warnings.simplefilter("ignore", FutureWarning)
        model.fit(pairs(_with_one(log["context"]), items[log["action"]]), log["reward"])
    seconds = time.perf_counter() - began
    weight = model.coef_[0].reshape(log["context"].shape[1] + 1, items.shape[1])
    column = world.truth.contexts.column(world.log.schema.context[0].source).combine_chunks()
    contexts = _with_one(vector_matrix(column, log["context"].shape[1]).astype(np.float64))
    # An inverse temperature at which the softmax is greedy, except for ties.
    scores = torch.from_numpy(contexts @ weight @ items.T) * 1e6
    return MethodResult(value_of_scores(scores, world.truth.expected(0, len(contexts))), seconds)


def misspecified_regression(world: QualityWorld, seed: int) -> MethodResult:
    """The greedy policy of a regression on every other feature of contexts and items."""
    _needs_vectors(world)
    found, seconds = misspecified_policy(world)
    return MethodResult(found, seconds)


def misspecified_dr(world: QualityWorld, seed: int) -> MethodResult:
    """DR with that regression as its reward model; the linear towers use all features."""
    objective = {"name": "clipped_dr", "arguments": {"max_weight": 10.0}}
    return _with_misspecified_model(world, seed, misspecified_settings(), objective)


def misspecified_potec(world: QualityWorld, seed: int) -> MethodResult:
    """POTEC with clusters and second stage from two towers on every other feature.

    The linear tower of the first stage uses all context features.
    """
    objective = {"name": "potec", "arguments": {"clusters": 10, "max_weight": 10.0}}
    return _with_misspecified_model(world, seed, misspecified_towers(), objective)


def _with_misspecified_model(
    world: QualityWorld, seed: int, reward_model: dict[str, Any], objective: dict[str, Any]
) -> MethodResult:
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


def revealed_labels(world: QualityWorld, seed: int) -> MethodResult:
    """The best ridge regression on the labels that the log reveals.

    Its settings are chosen by their true values, so this is a bound for other methods.
    """
    if world.baselines.get("supervised") is None:
        raise NotApplicable("has no labels")
    found, settings, seconds = best_of_revealed(world)
    return MethodResult(found, seconds, settings)


METHODS: Mapping[str, Method] = {
    "auto": auto,
    "tune": tuned,
    "plain_regression": plain_loop("regression"),
    "plain_ips": plain_loop("ips"),
    "plain_dr": plain_loop("dr"),
    "regression": learner_defaults("regression"),
    "ips": learner_defaults("ips"),
    "clipped_ips": learner_defaults("clipped_ips", max_weight=10.0),
    "snips": learner_defaults("snips"),
    "weighted_likelihood": learner_defaults("weighted_likelihood"),
    "implicit_squares": learner_defaults("implicit_squares"),
    "dr": learner_defaults("dr"),
    "clipped_dr": learner_defaults("clipped_dr", max_weight=10.0),
    "potec": learner_defaults("potec", clusters=10, max_weight=10.0),
    "logistic_cv": logistic_cv,
    "misspecified_regression": misspecified_regression,
    "misspecified_dr": misspecified_dr,
    "misspecified_potec": misspecified_potec,
    "revealed_labels": revealed_labels,
}


def _needs_vectors(world: QualityWorld) -> None:
    if [spec.kind for spec in world.catalogue.schema.features] != ["vector"]:
        raise NotApplicable("needs one vector feature for contexts and one for items")


def _trained(world: QualityWorld, seed: int, **sections: Any) -> MethodResult:
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
    return MethodResult(value(world, trainer.policy, data.items), seconds)


def _towers(hidden: list[int] | None, dim: int) -> dict[str, Any]:
    tower = {"hidden_layer_sizes": hidden}
    return {"embedding_dim": dim, "context_tower": tower, "item_tower": tower}


def _prepared(world: QualityWorld) -> PreparedData:
    return prepare(world.log, None, world.catalogue, Progress())


def _with_one(matrix: np.ndarray) -> np.ndarray:
    return np.concatenate([matrix, np.ones((len(matrix), 1))], axis=1)
