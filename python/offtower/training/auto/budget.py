"""Plan a run of `auto` within a budget of minutes.

Runs that would take a fifth of the budget on a slow machine, by a count of operations, are not
changed, so that their policies do not depend on the machine. Others are measured: what fits is not
changed either; for the rest the plan chooses sampled terms, the rows that are read and evaluated,
and the steps of a race by successive halving.

Source: Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
optimization".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from offtower.config import Config, TowerConfig
from offtower.data.rows import EncodedRows
from offtower.objectives import BehaviorCloning
from offtower.prepare import PreparedData
from offtower.progress import Progress, duration
from offtower.training.auto import speed
from offtower.training.auto.candidates import EXACT_FACTOR, PolicyCandidate, make_schedule
from offtower.training.auto.evaluator import FIRST_PHASE, MIN_SAMPLE
from offtower.training.auto.kept_rows import thinning_for
from offtower.training.auto.plan import (
    MIN_ROWS,
    MIN_STEPS,
    AutoPlan,
    CandidatePlan,
    Rung,
    groups_to_read,
)
from offtower.training.auto.work import (
    TowerSizes,
    member_bytes,
    training_bytes,
    whole_work,
)

_SLOW = 1e10
"""Operations per second of a slow machine; one core of 2024 reaches some 8e10 in the kernels."""
_CERTAIN = 0.2
"""Share of the budget that a run may take on a slow machine to be left as it is."""
_FITS = 0.6
"""Share of the budget that a run may take by this machine's measured operations."""
_READING, _TRAINING, _EVALUATION, _REFIT = 0.1, 0.5, 0.15, 0.2
"""Shares of the budget in a bounded plan; the rest is for its own measurements."""
_MOVED = 0.15
"""Of the budget, from training to evaluation where a candidate is solved: that takes less time, and
on large catalogues the evidence for it is what limits the choice."""
_CLONE = 0.15
"""Of the training's time, at most, for the clone of the logging policy. It reads all rows with
policy terms, so that its whole schedule can take as long as those of all others together."""
_SOLVE = 0.4
"""Of the training's time, at most, for a candidate that is solved."""
_SOLVED_ROWS = 1 << 20
"""In memory for it, at most."""
_FIRST_ROWS = 1 << 20
"""Held-out rows with approximate terms, in memory, at most."""
_MEMORY = 6 << 30
"""Bytes for members, their training and rewarded rows, at most."""
_KEPT_BYTES = 1 << 30
"""Of rewarded rows."""
_DIMS = (64, 32, 16)
"""Widths that are tried, in this order, where members are too large."""


def make_plan(
    config: Config,
    data: PreparedData,
    candidates: Sequence[PolicyCandidate],
    progress: Progress,
) -> AutoPlan:
    """Plan a run; `candidates` in prior order."""
    minutes = config.auto.budget
    if minutes is None:
        return whole_plan(config, data, candidates)
    work = whole_work(config, data, candidates)
    if work <= _CERTAIN * 60.0 * minutes * _SLOW:
        return whole_plan(config, data, candidates)
    progress.start("measuring the speed of this machine", None)
    if work <= _FITS * 60.0 * minutes * speed.operations_per_second(data.device):
        return whole_plan(config, data, candidates)
    return _Planner(config, data, candidates).plan()


def whole_plan(
    config: Config, data: PreparedData, candidates: Sequence[PolicyCandidate]
) -> AutoPlan:
    """The plan without a budget."""
    settings, rows = config.auto, data.train.num_rows
    schedule = make_schedule(settings, rows)
    thinning = thinning_for(data, rows, _SOLVED_ROWS)
    one = CandidatePlan(schedule.batch_size, schedule.epochs)
    solved = replace(one, epochs=1, thinning=thinning)
    return AutoPlan(
        bounded=False,
        rows=rows,
        rewarded_rows=0,
        members=settings.members or settings.folds,
        members_apart=False,
        terms=config.training.terms,
        candidates={each.name: solved if each.solved else one for each in candidates},
        rungs=(Rung(1.0, settings.held_out_rows, len(candidates)),),
    )


@dataclass(frozen=True)
class _Cost:
    """Measured cost of a candidate."""

    schedule: CandidatePlan
    steps: int
    """Of a whole schedule."""
    step: float
    """Seconds of a step of one member."""
    row: float
    """Seconds of the terms of a held-out row, without those of the reward model."""


class _Planner:
    """Makes a bounded plan.

    Attributes:
        seconds: of the budget.
        notes: what the plan gives up.
    """

    def __init__(
        self, config: Config, data: PreparedData, candidates: Sequence[PolicyCandidate]
    ) -> None:
        assert config.auto.budget is not None, "without a budget there is nothing to plan"
        self.seconds = 60.0 * config.auto.budget
        self.notes: list[str] = []
        self.dropped: dict[str, str] = {}
        self._data = data
        self._sample, read = speed.read_sample(data)
        self.rows = self._rows_to_read(config, read)
        many = data.items.num_items > EXACT_FACTOR * config.sampling.num_samples
        self.terms: Literal["exact", "sampled"] = "sampled" if many else config.training.terms
        self._config = with_terms(config, self.terms)
        self.max_dim, self.members, self.apart = self._memory(candidates)
        self._candidates = {
            one.name: narrowed(one, self.max_dim)
            for one in candidates
            if one.name not in self.dropped
        }
        moved = _MOVED if any(one.solved for one in self._candidates.values()) else 0.0
        self._training = (_TRAINING - moved) * self.seconds
        self._evaluation = (_EVALUATION + moved) * self.seconds
        self._rewarded = _rewarded_share(self._data, self._sample)

    def plan(self) -> AutoPlan:
        costs = {
            name: self._solution_cost(one) if one.solved else self._cost(one)
            for name, one in self._candidates.items()
        }
        costs = {name: self._limited(name, cost) for name, cost in costs.items()}
        costs = self._affordable(costs)
        rungs, factor = self._rungs(costs)
        refit = _REFIT * self.seconds / self.members
        kept = max(1, int(_KEPT_BYTES / max(self._sample.nbytes / len(self._sample), 1.0)))
        chosen = {
            name: cost.schedule
            if self._candidates[name].solved
            else replace(
                cost.schedule,
                steps=max(MIN_STEPS * len(rungs), int(factor * cost.steps)),
                seconds=factor * self.members * cost.steps * cost.step,
                refit_steps=max(MIN_STEPS, min(cost.steps, int(refit / cost.step))),
            )
            for name, cost in costs.items()
        }
        steps = [one.steps for name, one in costs.items() if not self._candidates[name].solved]
        if factor * min(steps, default=math.inf) < MIN_STEPS * len(rungs):
            self.notes.append(
                f"auto.budget of {self.seconds / 60.0:g} minutes is too short for more than "
                f"{MIN_STEPS} steps of a candidate in each stage: raise it, or name fewer "
                "auto.candidates"
            )
        whole = sum(cost.steps * cost.step for cost in costs.values())
        return AutoPlan(
            bounded=True,
            rows=self.rows,
            rewarded_rows=min(self.rows, kept)
            if any(one.rewarded_rows_only for one in chosen.values())
            else 0,
            members=self.members,
            members_apart=self.apart,
            terms=self.terms,
            candidates=chosen,
            rungs=rungs,
            refit_continues=len(rungs) > 1,
            max_embedding_dim=self.max_dim,
            dropped=self.dropped,
            notes=tuple(self.notes),
            seconds={
                "training": min(self._training, self.members * whole),
                "evaluation": self._evaluation,
                "refit": max(
                    # A solution of all rows is the same for every member.
                    costs[name].step
                    * (1 if one.refit_steps is None else self.members * one.refit_steps)
                    for name, one in chosen.items()
                ),
            },
        )

    def _rows_to_read(self, config: Config, seconds_per_row: float) -> int:
        """Rows whose reading takes the budget's share for it; the log is read about twice."""
        rows = self._data.train.num_rows
        if self._data.quarantine is not None:
            return rows  # The files of bad rows are those of the whole log.
        wanted = max(1, int(_READING * self.seconds / (2.0 * seconds_per_row)))
        if wanted >= rows:
            return rows
        groups = groups_to_read(self._data, config, wanted)
        found = int(self._data.train.row_group_sizes[groups].sum())
        self.notes.append(f"{found:,} of {rows:,} rows of the log are read")
        return wanted

    def _memory(self, candidates: Sequence[PolicyCandidate]) -> tuple[int | None, int, bool]:
        """Largest embedding, members per candidate, and whether these are fitted apart."""
        settings = self._config.auto
        limit = min(_MEMORY, speed.machine_bytes() // 2) - _KEPT_BYTES
        wanted = settings.members or settings.folds
        for dim in (None, *_DIMS):
            sizes = [TowerSizes.of(narrowed(one, dim), self._data) for one in candidates]
            loaded = sum(member_bytes(one) for one in sizes)
            largest = max(training_bytes(one, members=1) for one in sizes)
            for members in range(wanted, 0, -1):
                for apart in (False, True):
                    if members * loaded + (1 if apart else members) * largest <= limit:
                        if (dim, members) != (None, wanted):
                            width = "" if dim is None else f", with embeddings of {dim} numbers"
                            self.notes.append(
                                f"{members} members per candidate{width}, so that training fits "
                                f"in {limit / 2**30:.1f} GiB"
                            )
                        return dim, members, apart
        kept = [one.name for one in candidates][:1]
        self.dropped.update(
            {one.name: "too large for memory" for one in candidates if one.name not in kept}
        )
        return _DIMS[-1], 1, True

    def _cost(self, candidate: PolicyCandidate) -> _Cost:
        """Measure a candidate; its whole schedule is that of the rows that its objective reads."""
        rewarded = candidate.objective.requirements.rewarded_rows_only and self._rewarded <= 0.5
        rows = max(1, round(self.rows * (self._rewarded if rewarded else 1.0)))
        schedule = make_schedule(self._config.auto, rows)
        steps = math.ceil(schedule.epochs * rows / schedule.batch_size)
        sample = self._sample
        if rewarded and sample.reward.any():
            sample = sample.take(sample.reward.nonzero()[0])
        step = speed.step_seconds(candidate, self._config, self._data, sample, schedule.batch_size)
        row = speed.row_seconds(candidate, self._data)
        plan = CandidatePlan(
            schedule.batch_size,
            # Batches are cut by fold and window, which makes a few more of them.
            2 * schedule.epochs + 1,
            rewarded_rows_only=rewarded,
        )
        return _Cost(plan, steps, step, row)

    def _solution_cost(self, candidate: PolicyCandidate) -> _Cost:
        """Measure a candidate that is solved, in one step, on as many rows as there is time for."""
        row = speed.solution_seconds(candidate, self._data, self._sample)
        seconds = _SOLVE * self._training / self.members
        bytes_of_row = self._sample.nbytes / len(self._sample)
        most = min(_SOLVED_ROWS, int(seconds / row), int(_KEPT_BYTES / bytes_of_row))
        thinning = thinning_for(self._data, self.rows, max(1, most))
        plan = CandidatePlan(1, 1, thinning=thinning)
        kept = min(self.rows, most)
        return _Cost(plan, 1, kept * row, speed.row_seconds(candidate, self._data))

    def _limited(self, name: str, cost: _Cost) -> _Cost:
        """Shorten the schedule of a clone; it needs a sample of the rows."""
        if not stays(self._candidates[name]):
            return cost
        steps = int(_CLONE * self._training / (self.members * cost.step))
        return replace(cost, steps=max(MIN_STEPS, min(cost.steps, steps)))

    def _affordable(self, costs: Mapping[str, _Cost]) -> dict[str, _Cost]:
        """Leave out candidates that need most of the training's time for a tenth of their steps."""
        limit = 0.5 * self._training / self.members
        kinds = self._candidates
        racing = [n for n in costs if not (kinds[n].solved or stays(kinds[n]))]
        kept = [name for name in racing if 0.1 * costs[name].steps * costs[name].step < limit]
        if racing and not kept:
            kept = [min(racing, key=lambda name: costs[name].step)]
        for name in racing:
            if name not in kept:
                cost = costs[name]
                whole = duration(self.members * cost.steps * cost.step)
                self.dropped[name] = f"its {cost.steps:,} steps would take {whole}"
        return {name: cost for name, cost in costs.items() if name not in self.dropped}

    def _rungs(self, costs: Mapping[str, _Cost]) -> tuple[tuple[Rung, ...], float]:
        """Rungs, and the share of whole schedules that they train for."""
        whole = {name: self.members * cost.steps * cost.step for name, cost in costs.items()}
        # A solution has no later stages.
        trained = {n: 0.0 if self._candidates[n].solved else one for n, one in whole.items()}
        solved = sum(whole.values()) - sum(trained.values())
        budget = self._training - solved
        regressions, protected, others = self._kinds(costs)
        if sum(trained.values()) <= budget:
            held_out, rows = self._held_out(list(costs), costs, 1)
            return (Rung(1.0, held_out, len(costs), rows),), 1.0
        number = 1 + max(0, math.ceil(math.log2(max(len(regressions), len(others), 1))))
        shares = [2**k / (2**number - 1) for k in range(number)]
        rungs: list[Rung] = []
        cost, left = 0.0, len(others)
        # A rung after which no candidate may leave by its value needs no values.
        evaluations = 1 + sum(math.ceil(len(others) / 2**k) > 1 for k in range(number - 1))
        for k, share in enumerate(shares):
            racing = _costliest(others, trained, left)
            models = _costliest(regressions, trained, len(regressions) if k == 0 else 1)
            taking_part = [*racing, *models, *protected]
            seconds = share * sum(trained[name] for name in taking_part)
            cost += seconds
            final = k + 1 == number
            held_out, rows = self._held_out(taking_part, costs, evaluations)
            evaluation = self._evaluation / evaluations
            if left <= 1 and not final:
                rows, evaluation = 0, 0.0
            left = left if final else max(1, math.ceil(left / 2))
            rungs.append(Rung(share, held_out, left, rows, seconds, evaluation, final))
        factor = min(1.0, budget / cost)
        rungs = [replace(one, training_seconds=factor * one.training_seconds) for one in rungs]
        rungs[0] = replace(rungs[0], training_seconds=rungs[0].training_seconds + solved)
        return tuple(rungs), factor

    def _kinds(self, names: Mapping[str, object]) -> tuple[list[str], list[str], list[str]]:
        """Regressions, candidates that never leave, and others."""
        kinds = self._candidates
        regressions = [name for name in names if kinds[name].predicts_rewards]
        protected = [name for name in names if stays(kinds[name]) and name not in regressions]
        others = [name for name in names if name not in regressions and name not in protected]
        return regressions, protected, others

    def _held_out(
        self, names: Sequence[str], costs: Mapping[str, _Cost], rungs: int
    ) -> tuple[int, int]:
        """Rows of the two phases of one rung's evaluation, with the best one of the regressions."""
        models = [costs[name].row for name in names if self._candidates[name].predicts_rewards]
        others = [costs[n].row for n in names if not self._candidates[n].predicts_rewards]
        row = sum(others) + max(models, default=0.0)
        exact = self._evaluation / rungs / (1.0 + FIRST_PHASE)
        evaluated = max(MIN_ROWS, min(int(exact / row), self._config.auto.held_out_rows))
        approximate = FIRST_PHASE * exact * self._data.items.num_items / (MIN_SAMPLE * row)
        kept = _KEPT_BYTES * len(self._sample) / max(self._sample.nbytes, 1)
        return max(evaluated, int(min(approximate, kept, _FIRST_ROWS))), evaluated


def with_terms(config: Config, terms: Literal["exact", "sampled"]) -> Config:
    """The configuration with other `training.terms`."""
    return replace(config, training=replace(config.training, terms=terms))


def stays(candidate: PolicyCandidate) -> bool:
    """Whether a candidate never leaves the race: the clone of the logging policy stands for the
    choice to keep that one."""
    return isinstance(candidate.objective, BehaviorCloning)


def narrowed(candidate: PolicyCandidate, max_dim: int | None) -> PolicyCandidate:
    """The candidate with embeddings of at most `max_dim` numbers."""
    if max_dim is None:
        return candidate
    policy = candidate.policy

    def side(given: TowerConfig) -> TowerConfig:
        dim = min(given.category_embedding_dim, max_dim)
        return replace(given, category_embedding_dim=dim)

    changed = replace(
        policy,
        embedding_dim=min(policy.embedding_dim, max_dim),
        context_tower=side(policy.context_tower),
        item_tower=side(policy.item_tower),
    )
    return replace(candidate, policy=changed)


def _costliest(names: Sequence[str], cost: Mapping[str, float], number: int) -> list[str]:
    return sorted(names, key=lambda name: -cost[name])[:number]


def _rewarded_share(data: PreparedData, sample: EncodedRows) -> float:
    """Share of rows with a reward other than 0."""
    if data.facts.binary_reward:
        return data.facts.mean_reward
    return float((sample.reward != 0.0).mean())
