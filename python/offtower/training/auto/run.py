"""Fit all candidates, choose one on held-out rows, and join its members."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offtower.config import Config
from offtower.mapping import Mapper
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import save_policy
from offtower.prepare import PreparedData
from offtower.progress import Progress, duration
from offtower.run_directory import RunDirectory
from offtower.training.auto.budget import make_plan, narrowed, with_terms
from offtower.training.auto.candidate_learner import AutoInputs, CandidateLearner, ReadLog, Stage
from offtower.training.auto.candidates import PolicyCandidate, Schedule, make_candidates
from offtower.training.auto.choice import Choice
from offtower.training.auto.ensemble import join
from offtower.training.auto.evaluator import SCAN_ROWS
from offtower.training.auto.folds import Folds
from offtower.training.auto.held_out import HeldOutRows
from offtower.training.auto.plan import FILE, AutoPlan, read_plan, write_plan
from offtower.training.auto.prior_order import CLONE
from offtower.training.auto.race import Race, RaceResult
from offtower.training.auto.serving import Requirement, propose_serving
from offtower.training.trainer import TrainingOutputs, TrainingResult


@dataclass(frozen=True)
class AutoTraining:
    """The policy and the evidence for it."""

    policy: TwoTowerPolicy
    choice: Choice
    members: Mapping[str, list[TwoTowerPolicy]]
    """Of the candidates of the last stage."""
    rows: HeldOutRows
    """The evidence, from which another choice can be made without another fit."""
    result: TrainingResult
    report: dict[str, Any]
    """JSON: the chosen candidate, all estimates and held-out losses, the plan and its stages."""

    def store_reward_model(self, directory: Path, *, binary: bool) -> None:
        """Store the regression of least held-out loss for evaluations, if there is one.

        It is the mean of its members' logits. Its members learned from the training log only.
        """
        names = [name for name in self.rows.loss if name in self.members]
        if names and self.members[names[0]][0].config.item_bias:
            best = min(names, key=self.rows.loss.__getitem__)
            link = "sigmoid" if binary else "identity"
            facts = {"candidate": best, "link": link, "loss": self.rows.loss[best]}
            bias = 0.0 if best in self.rows.based else 1.0
            save_policy(directory, join(self.members[best], 1.0, bias), facts)


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
        run: keeps the plan and fitted members, so that a killed run can continue.
        mapper: fits members; a distributed one takes them one by one and needs `run` in a place
            that its workers see.

    Raises:
        ConfigError: no candidate is possible, or `auto.plan` does not fit them.
    """
    outputs = outputs or TrainingOutputs()
    progress, metrics = outputs.progress, outputs.metrics
    settings = config.auto
    began = time.monotonic()
    candidates = make_candidates(config, data)
    plan = _plan(config, data, candidates, run, progress)
    log = ReadLog(plan.limited(data, config), plan, config.seed, progress)
    folds = Folds(settings.folds, tuple(range(plan.members)), config.seed)
    inputs = AutoInputs(
        with_terms(config, plan.terms),
        plan,
        {
            one.name: narrowed(one, plan.max_embedding_dim)
            for one in candidates
            if one.name in plan.candidates
        },
        folds.balanced(log.data.scan(SCAN_ROWS)),
    )
    learner = CandidateLearner(inputs, log, mapper or Mapper(), run, progress)
    clock = StageReports(plan, progress)
    found = Race(
        inputs, learner, log, progress, clock.training, lambda plan: _store(plan, run)
    ).run()
    plan = found.plan
    choice, chosen = found.choice, found.choice.chosen
    final = found.members[chosen.name]
    inverse_temperature = chosen.inverse_temperature
    based = chosen.name in found.rows.based
    if settings.refit:
        clock.refit(chosen.name)
        final = learner.members(_refit(plan, found), [chosen.name])[chosen.name]
        if chosen.name != CLONE:
            # Members that saw more rows may have larger logits: keep the policy as sharp as chosen.
            scale = found.evaluator.scale(final, based=based)
            inverse_temperature *= found.rows.scale[chosen.name] / scale
    policy = join(final, inverse_temperature, 1.0 if based else None)
    required = config.evaluation.gate.min_effective_sample_size
    served = propose_serving(
        choice,
        found.rows,
        Requirement(data.train.num_rows, required, config.evaluation.confidence),
    )
    report = {
        **describe(choice, found.rows.loss),
        "serving": served.to_dict(),
        "dropped": found.dropped,
        "rows": log.data.train.num_rows,
        "rows_of_log": data.train.num_rows,
        "stages": found.stages,
        "seconds": round(time.monotonic() - began, 3),
        "plan": plan.to_dict(),
    }
    schedule = plan.candidates[chosen.name]
    steps = schedule.steps or schedule.epochs * -(-data.train.num_rows // schedule.batch_size)
    metrics.restart()
    metrics.write({"kind": "auto", "step": steps, **report})
    line: dict[str, Any] = {
        "kind": "epoch",
        "step": steps,
        "epoch": schedule.epochs - 1,
        "value_estimate": choice.value,
        "validation": {
            "value": choice.value,
            "low": choice.low,
            "undecided": {name: asdict(one) for name, one in choice.undecided.items()},
            "high": 2.0 * choice.value - choice.low,
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
        validation=choice.low,
        stopped_early=False,
        history=metrics.epochs(),
        chosen=chosen.name,
        advice=choice.advice or served.text,
    )
    return AutoTraining(policy, choice, found.members, found.rows, result, report)


def _plan(
    config: Config,
    data: PreparedData,
    candidates: Sequence[PolicyCandidate],
    run: RunDirectory | None,
    progress: Progress,
) -> AutoPlan:
    """Read the run's plan, or that of `auto.plan`, or make one; it is stored before it is used."""
    stored = None if run is None else run.auto / FILE
    if stored is not None and stored.exists():
        return read_plan(stored)
    plan = (
        make_plan(config, data, candidates, progress)
        if config.auto.plan is None
        else read_plan(Path(config.auto.plan)).fitting(
            [one.name for one in candidates], data.train.num_rows
        )
    )
    progress.finish()
    if run is not None and stored is not None:
        run.check_owner()
        # Members without the plan that they were trained by, as an unfinished copy may have them.
        shutil.rmtree(run.auto, ignore_errors=True)
        write_plan(stored, plan)
    return plan


def _store(plan: AutoPlan, run: RunDirectory | None) -> None:
    if run is not None:
        run.check_owner()
        write_plan(run.auto / FILE, plan)


def _refit(plan: AutoPlan, found: RaceResult) -> Stage:
    """The stage in which the chosen candidate's members see all rows."""
    name = found.choice.chosen.name
    one = plan.candidates[name]
    return Stage(
        "refit",
        {name: Schedule(one.epochs, one.batch_size, one.refit_steps)},
        found.stage.number + 1 if plan.refit_continues else 0,
        held_out=False,
        after=found.stage.name if plan.refit_continues else None,
    )


class StageReports:
    """Reports each stage of a bounded plan with the time that is left."""

    def __init__(self, plan: AutoPlan, progress: Progress) -> None:
        self._plan, self._progress = plan, progress
        seconds = plan.seconds
        self._race = seconds.get("training", 0.0) + seconds.get("evaluation", 0.0)
        self._refit = seconds.get("refit", 0.0)
        for note in (*plan.notes, *(f"without {k}: {v}" for k, v in plan.dropped.items())):
            progress.note(f"auto: {note}")

    def training(self, what: str, begun: float) -> None:
        """Report a stage of the race before which the share `begun` of it is done."""
        self._report(what, self._race * (1.0 - begun) + self._refit)

    def refit(self, name: str) -> None:
        """Report the refit."""
        self._report(f"training {name} on all rows", self._refit)

    def _report(self, what: str, left: float) -> None:
        if self._plan.bounded:
            self._progress.note(f"auto: {what}; at most about {duration(left)} left")


def describe(choice: Choice, loss: Mapping[str, float]) -> dict[str, Any]:
    """Return the choice and all estimates as JSON."""
    keys = ("inverse_temperature", "value", "lower_bound", "gain_lower_bound", "mean_weight")
    return {
        "chosen": choice.chosen.name,
        "keep_logging": choice.keep_logging,
        "logging": choice.logging,
        **{key: getattr(choice.chosen, key) for key in keys},
        "value": choice.value,
        "low": choice.low,
        "held_out_loss": dict(loss),
        "candidates": {
            name: [{key: getattr(one, key) for key in keys} for one in options]
            for name, options in choice.estimates.items()
        },
    }
