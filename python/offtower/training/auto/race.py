"""Train candidates in stages, and let those leave that held-out rows speak against.

A plan without a budget has one stage. In a race, stages double in length, candidates continue from
their weights, and after each stage regressions with a higher held-out loss and the half of the
others with the lower upper bounds leave. Where only regressions race, stages before the last one
compare losses alone, and all of the time for evidence goes into the choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from offtower.models.policy import TwoTowerPolicy
from offtower.progress import Progress
from offtower.training.auto.budget import stays
from offtower.training.auto.candidate_learner import AutoInputs, CandidateLearner, ReadLog, Stage
from offtower.training.auto.candidates import Schedule
from offtower.training.auto.choice import Choice, Tolerance, choose
from offtower.training.auto.estimates import CandidateEstimate
from offtower.training.auto.evaluator import HeldOutEvaluator
from offtower.training.auto.held_out import EvaluatedCandidates, HeldOutRows
from offtower.training.auto.plan import MIN_ROWS, AutoPlan, Rung
from offtower.training.auto.speed import ROWS_PER_PASS

_BLOCKS = 4
"""Blocks of held-out rows, at most; after each one candidates may leave."""

Members = dict[str, list[TwoTowerPolicy]]


@dataclass
class RaceResult:
    """The candidates of the last stage, and what led to them."""

    stage: Stage
    members: Members
    rows: HeldOutRows
    choice: Choice
    evaluator: HeldOutEvaluator
    plan: AutoPlan
    """As revised."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """JSON: name, candidates, seconds, held-out rows of each stage."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Candidates that left, and why."""


class Race:
    """Runs the rungs of a plan.

    Args:
        inputs: plan, candidates, folds.
        learner: fits members.
        log: the rows that are read.
        report: receives a message at the begin of each stage.
        store: receives the plan for what is left after each stage, before it is used.
    """

    def __init__(
        self,
        inputs: AutoInputs,
        learner: CandidateLearner,
        log: ReadLog,
        progress: Progress,
        report: Callable[[str, float], None],
        store: Callable[[AutoPlan], None],
    ) -> None:
        self._inputs, self._learner, self._log = inputs, learner, log
        self._progress, self._report, self._store = progress, report, store
        self._dropped: dict[str, str] = dict(inputs.plan.dropped)

    def run(self) -> RaceResult:
        """Train and evaluate the candidates; the last rung makes the choice."""
        names = list(self._inputs.plan.candidates)
        stages: list[dict[str, Any]] = []
        stage: Stage | None = None
        result: RaceResult | None = None
        number = 0
        while number < len(self._inputs.plan.rungs):
            rung = self._inputs.plan.rungs[number]
            result = None  # Release the members of the stage before.
            began = time.monotonic()
            stage = self._stage(number, rung, stage)
            # All rungs of a race cost about the same.
            self._report(f"training {', '.join(names)}", number / len(self._inputs.plan.rungs))
            members = self._learner.members(stage, names)
            trained = time.monotonic()
            evaluator, candidates = self._compare_losses(stage, members, rung)
            left = list(candidates.members)
            if rung.evaluated_rows != 0:
                result = self._evaluate(stage, members, rung, evaluator, candidates)
                left = list(result.rows.scale)
            stages.append(
                {
                    "stage": stage.name,
                    "candidates": names,
                    "training_seconds": round(trained - began, 3),
                    "evaluation_seconds": round(time.monotonic() - trained, 3),
                    "held_out_rows": 0 if result is None else round(result.rows.size),
                    "evaluated_rows": evaluator.evaluated,
                }
            )
            names = [name for name in names if name in left]
            if not rung.final:
                self._revise(stages, names)
            number += 1
        assert result is not None, "the last rung of a plan has evaluated rows"
        result.stages, result.dropped = stages, self._dropped
        result.plan = self._inputs.plan
        return result

    def _revise(self, stages: Sequence[Mapping[str, Any]], left: Sequence[str]) -> None:
        plan = self._inputs.plan
        if plan.revised >= len(stages):
            return  # A resumed run follows the plan that it had.
        revised = plan.revise(
            [one["training_seconds"] for one in stages],
            [one["evaluation_seconds"] for one in stages],
            left,
        )
        self._store(revised)
        self._inputs = replace(self._inputs, plan=revised)

    def _stage(self, number: int, rung: Rung, before: Stage | None) -> Stage:
        schedules = {
            name: Schedule(
                one.epochs,
                one.batch_size,
                None if one.steps is None else max(1, round(rung.share * one.steps)),
            )
            for name, one in self._inputs.plan.candidates.items()
        }
        name = "out_of_fold" if number == 0 else f"out_of_fold_{number + 1}"
        return Stage(name, schedules, number, after=None if before is None else before.name)

    def _compare_losses(
        self, stage: Stage, members: Members, rung: Rung
    ) -> tuple[HeldOutEvaluator, EvaluatedCandidates]:
        """The candidates without the regressions whose held-out loss is not the least."""
        inputs, data = self._inputs, self._log.data
        rows = rung.evaluated_rows
        evaluator = HeldOutEvaluator(
            *(data, inputs.folds, rung.held_out_rows, inputs.config.training.item_chunk),
            self._progress,
            None if rows is None else max(rows, MIN_ROWS),
        )
        self._progress.start("comparing held-out losses", None)
        regressions = [name for name in members if inputs.candidates[name].predicts_rewards]
        candidates = evaluator.candidates(
            members,
            regressions,
            binary=data.facts.binary_reward,
            based=[name for name in members if inputs.candidates[name].solved],
        )
        self._progress.finish()
        for name in regressions:
            if name != candidates.reward_model:
                self._dropped[name] = (
                    f"held-out loss {candidates.loss[name]:.4g} after stage {stage.name}, for "
                    f"{candidates.loss[str(candidates.reward_model)]:.4g} of "
                    f"{candidates.reward_model}"
                )
        return evaluator, candidates

    def _evaluate(
        self,
        stage: Stage,
        members: Members,
        rung: Rung,
        evaluator: HeldOutEvaluator,
        candidates: EvaluatedCandidates,
    ) -> RaceResult:
        self._progress.start("evaluating candidates on held-out rows", evaluator.rows)
        if self._inputs.plan.bounded:
            rows, choice = self._in_blocks(evaluator, candidates, rung, stage)
        else:
            rows = evaluator.terms(candidates)
            choice = self._choose(rows)
        self._progress.finish()
        return RaceResult(stage, members, rows, choice, evaluator, self._inputs.plan)

    def _in_blocks(
        self,
        evaluator: HeldOutEvaluator,
        candidates: EvaluatedCandidates,
        rung: Rung,
        stage: Stage,
    ) -> tuple[HeldOutRows, Choice]:
        """Evaluate block after block of rows; candidates whose upper bound is below the lower bound
        of the chosen one leave."""
        rows: HeldOutRows | None = None
        passes = len(self._inputs.folds.held_out) * ROWS_PER_PASS
        blocks = max(1, min(_BLOCKS, evaluator.rows // passes))
        for block in range(blocks):
            rows = evaluator.terms(candidates, (block / blocks, (block + 1) / blocks), rows)
            choice = self._choose(rows)
            racing = self._racing(candidates, choice)
            beaten = [name for name in racing if upper_bound(choice.best[name]) < choice.chosen.low]
            candidates = candidates.without(beaten)
            rows, choice = self._leave(beaten, stage, rows, choice)
            left = len(racing) - len(beaten)
            if not rung.final and left <= rung.remaining:
                break
        assert rows is not None
        if not rung.final:
            racing = self._racing(candidates, choice)
            racing.sort(key=lambda name: -upper_bound(choice.best[name]))
            rows, choice = self._leave(racing[rung.remaining :], stage, rows, choice)
        return rows, choice

    def _racing(self, candidates: EvaluatedCandidates, choice: Choice) -> list[str]:
        """Candidates that may leave: neither the reward model, nor clones of the logging policy.
        The chosen one comes first where bounds are equal."""
        names = [
            name
            for name in candidates.members
            if name != candidates.reward_model and not stays(self._inputs.candidates[name])
        ]
        return sorted(names, key=lambda name: name != choice.chosen.name)

    def _leave(
        self, names: Sequence[str], stage: Stage, rows: HeldOutRows, choice: Choice
    ) -> tuple[HeldOutRows, Choice]:
        """The rows and the choice without the named candidates."""
        if not names:
            return rows, choice
        chosen = choice.chosen
        for one in (choice.best[name] for name in names):
            self._dropped[one.name] = (
                f"value {one.value:.4g}, at most {upper_bound(one):.4g}, after stage {stage.name}; "
                f"{chosen.name} has {chosen.value:.4g}"
            )
        left = rows.without(names)
        return left, self._choose(left)

    def _choose(self, rows: HeldOutRows) -> Choice:
        config, data = self._inputs.config, self._log.data
        return choose(
            rows,
            # In prior order; of the regressions only the best is left.
            [name for name in self._inputs.plan.candidates if name in rows.scale],
            min_reward=float(data.train.schema.reward_range[0]),
            confidence=config.evaluation.confidence,
            tolerance=self._tolerance(),
            dropped=sum(name not in rows.scale for name in self._inputs.plan.candidates),
        )

    def _tolerance(self) -> Tolerance | None:
        settings = self._inputs.config.auto
        if settings.tolerated_loss is None:
            return None
        low, high = self._log.data.train.schema.reward_range
        return Tolerance(settings.tolerated_loss * (high - low), settings.loss_risk)


def upper_bound(estimate: CandidateEstimate) -> float:
    """As far above the value as the lower bound is below it."""
    return 2.0 * estimate.value - estimate.low
