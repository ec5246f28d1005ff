"""Learn all candidates, judge them where they did not learn, join the members of the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offtower.config import Config
from offtower.data.reader import scan
from offtower.mapping import Mapper
from offtower.metrics import MetricsLog
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.run_directory import RunDirectory
from offtower.training.auto.candidates import make_candidates, make_schedule
from offtower.training.auto.choose import Choice, choose
from offtower.training.auto.ensemble import join
from offtower.training.auto.folds import Folds
from offtower.training.auto.judge import SCAN_ROWS, Judge
from offtower.training.auto.learning import CandidateLearner
from offtower.training.trainer import EpochHook, TrainingResult


@dataclass(frozen=True)
class AutoTraining:
    """The policy, and how it was chosen."""

    policy: TwoTowerPolicy
    choice: Choice
    members: Mapping[str, list[TwoTowerPolicy]]
    result: TrainingResult
    report: dict[str, Any]
    """JSON: the chosen candidate, every candidate's estimate at every sharpness, losses."""


def train_auto(
    config: Config,
    data: PreparedData,
    *,
    progress: Progress | None = None,
    metrics: MetricsLog | None = None,
    run: RunDirectory | None = None,
    mapper: Mapper | None = None,
    on_epoch_end: EpochHook | None = None,
) -> AutoTraining:
    """Learn a policy that needs no settings.

    Args:
        config: `auto`, `policy` sizes, `seed`.
        data: its training log has propensities. A validation log is not needed, nor read.
        progress, metrics: where both go.
        on_epoch_end: called once, with the policy that was chosen.
        run: where members are kept once they are learned, so that a run that was killed goes on.
        mapper: learns members; one that works elsewhere takes them one by one, and needs `run`, in
            a place that its workers see.

    Raises:
        ConfigError: no candidate is possible.
    """
    progress, metrics = progress or Progress(), metrics or MetricsLog(None)
    settings = config.auto
    number = settings.members or settings.folds
    folds = Folds(settings.folds, tuple(range(number)), config.seed).balanced(
        scan(
            data.train,
            data.catalogue,
            data.context_encoding,
            SCAN_ROWS,
            on_bad_rows=data.on_bad_rows,
            quarantine=data.quarantine_of("train"),
        )
    )
    schedule = make_schedule(settings, data.train.num_rows)
    candidates = make_candidates(config, data)
    names = [candidate.name for candidate in candidates]
    learned = CandidateLearner(
        config, data, candidates, folds, schedule, mapper or Mapper(), run, progress
    )
    members = learned("judged", names)
    progress.start("judging candidates on held-out rows", None)
    judge = Judge(data, folds, settings.judge_rows, config.training.item_chunk)
    regressions = [one.name for one in candidates if one.predicts_rewards]
    judged = judge(members, regressions, data.facts.binary_reward)
    choice = choose(
        judged,
        # In the order of belief; of regressions the best is left.
        [name for name in names if name in judged.scale],
        least_reward=float(data.train.schema.reward_range[0]),
        confidence=config.evaluation.confidence,
    )
    progress.finish()
    report = describe(choice, judged.loss)
    chosen, final = choice.chosen, members[choice.chosen.name]
    factor = chosen.factor
    if settings.refit:
        final = learned("refit", [chosen.name])[chosen.name]
        # As sharp as what was judged: members that saw more rows may have larger logits.
        factor *= judged.scale[chosen.name] / judge.scale(final)
    policy = join(final, factor)
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
    if on_epoch_end is not None:
        line.update(on_epoch_end(policy, schedule.epochs - 1))
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
    """What was chosen between, as JSON takes it."""
    return {
        "chosen": choice.chosen.name,
        "factor": choice.chosen.factor,
        "value": choice.chosen.value,
        "low": choice.chosen.low,
        "mean_weight": choice.chosen.mean_weight,
        "held_out_loss": dict(loss),
        "candidates": {
            name: [
                {"factor": s.factor, "value": s.value, "low": s.low, "mean_weight": s.mean_weight}
                for s in options
            ]
            for name, options in choice.scored.items()
        },
    }
