"""Fit all candidates, choose one on held-out rows, and join its members."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offtower.config import Config
from offtower.mapping import Mapper
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData
from offtower.run_directory import RunDirectory
from offtower.training.auto.candidate_learner import CandidateLearner
from offtower.training.auto.candidates import make_candidates, make_schedule
from offtower.training.auto.choice import Choice, choose
from offtower.training.auto.ensemble import join
from offtower.training.auto.folds import Folds
from offtower.training.auto.held_out import SCAN_ROWS, HeldOutEvaluator
from offtower.training.trainer import TrainingOutputs, TrainingResult


@dataclass(frozen=True)
class AutoTraining:
    """The policy and the evidence for it."""

    policy: TwoTowerPolicy
    choice: Choice
    members: Mapping[str, list[TwoTowerPolicy]]
    result: TrainingResult
    report: dict[str, Any]
    """JSON: the chosen candidate, all estimates and held-out losses."""


def train_auto(
    config: Config,
    data: PreparedData,
    *,
    outputs: TrainingOutputs | None = None,
    run: RunDirectory | None = None,
    mapper: Mapper | None = None,
) -> AutoTraining:
    """Train a policy that needs no settings.

    Args:
        config: `auto`, `policy` sizes, `seed`.
        data: its training log has propensities. A validation log is neither needed nor read.
        outputs: metrics, progress and `on_epoch_end`, which is called once with the chosen policy.
        run: keeps fitted members, so that a killed run can continue.
        mapper: fits members; a distributed one takes them one by one and needs `run` in a place
            that its workers see.

    Raises:
        ConfigError: no candidate is possible.
    """
    outputs = outputs or TrainingOutputs()
    progress, metrics = outputs.progress, outputs.metrics
    settings = config.auto
    number = settings.members or settings.folds
    folds = Folds(settings.folds, tuple(range(number)), config.seed)
    folds = folds.balanced(data.scan(SCAN_ROWS))
    schedule = make_schedule(settings, data.train.num_rows)
    candidates = make_candidates(config, data)
    names = [candidate.name for candidate in candidates]
    learner = CandidateLearner(
        config, data, candidates, folds, schedule, mapper or Mapper(), run, progress
    )
    members = learner.members("out_of_fold", names)
    progress.start("evaluating candidates on held-out rows", None)
    evaluator = HeldOutEvaluator(data, folds, settings.held_out_rows, config.training.item_chunk)
    rows = evaluator.evaluate(
        members,
        [one.name for one in candidates if one.predicts_rewards],
        binary=data.facts.binary_reward,
    )
    choice = choose(
        rows,
        # In prior order; of the regressions only the best is left.
        [name for name in names if name in rows.scale],
        min_reward=float(data.train.schema.reward_range[0]),
        confidence=config.evaluation.confidence,
    )
    progress.finish()
    chosen, final = choice.chosen, members[choice.chosen.name]
    inverse_temperature = chosen.inverse_temperature
    if settings.refit:
        final = learner.members("refit", [chosen.name])[chosen.name]
        # Members that saw more rows may have larger logits: keep the policy as sharp as chosen.
        inverse_temperature *= rows.scale[chosen.name] / evaluator.scale(final)
    policy = join(final, inverse_temperature)
    report = describe(choice, rows.loss)
    steps = schedule.epochs * -(-data.train.num_rows // schedule.batch_size)
    metrics.restart()
    metrics.write({"kind": "auto", "step": steps, **report})
    line: dict[str, Any] = {
        "kind": "epoch",
        "step": steps,
        "epoch": schedule.epochs - 1,
        "value_estimate": chosen.value,
        "validation": {
            "value": chosen.value,
            "low": chosen.low,
            "high": 2.0 * chosen.value - chosen.low,
            "estimator": "dr of held-out training rows",
        },
    }
    if outputs.on_epoch_end is not None:
        line.update(outputs.on_epoch_end(policy, schedule.epochs - 1))
    metrics.write(line)
    result = TrainingResult(
        epochs=schedule.epochs,
        steps=steps,
        selected_step=steps,
        validation=chosen.low,
        stopped_early=False,
        history=metrics.epochs(),
        chosen=chosen.name,
    )
    return AutoTraining(policy, choice, members, result, report)


def describe(choice: Choice, loss: Mapping[str, float]) -> dict[str, Any]:
    """Return the choice and all estimates as JSON."""
    keys = ("inverse_temperature", "value", "low", "mean_weight")
    return {
        "chosen": choice.chosen.name,
        **{key: getattr(choice.chosen, key) for key in keys},
        "held_out_loss": dict(loss),
        "candidates": {
            name: [{key: getattr(one, key) for key in keys} for one in options]
            for name, options in choice.estimates.items()
        },
    }
