"""Fit the members of candidates in this process or as parts on other machines.

A member depends only on its seeds, its rows, its candidate and its stage. All members of a
candidate may be fitted in one pass over the log, or each on its own worker, with identical bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from offtower.config import Config
from offtower.log_sums import LogFacts
from offtower.mapping import Mapper
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData, open_data
from offtower.progress import Progress
from offtower.run_directory import RunDirectory
from offtower.sampling import ItemCounts, count_items
from offtower.training.auto.base_measure import LoggedItems
from offtower.training.auto.candidates import PolicyCandidate, Schedule
from offtower.training.auto.folds import Folds
from offtower.training.auto.kept_rows import SCAN_ROWS, KeptRows, keep_rewarded, keep_thinned
from offtower.training.auto.member_store import MemberStore, Weights
from offtower.training.auto.members import FitStart, fit_members
from offtower.training.auto.mixed_policy import MIXED, fit_mixed_members
from offtower.training.auto.plan import AutoPlan
from offtower.training.device import to_configured_device


@dataclass(frozen=True)
class Stage:
    """Fits of candidates' members that are stored together."""

    name: str
    """Of the folder."""
    schedules: Mapping[str, Schedule]
    """By candidate."""
    number: int = 0
    """Stages before it."""
    held_out: bool = True
    """Whether members do not see their folds."""
    after: str | None = None
    """The stage whose weights it continues from; None draws them."""


@dataclass(frozen=True)
class Part:
    """Members of one candidate that are fitted in one pass, by their indices into the folds."""

    candidate: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class AutoInputs:
    """What all stages share."""

    config: Config
    plan: AutoPlan
    candidates: Mapping[str, PolicyCandidate]
    folds: Folds

    def empty(self, candidate: str, data: PreparedData) -> TwoTowerPolicy:
        """A member whose weights are to be loaded."""
        settings = self.candidates[candidate].policy
        policy = TwoTowerPolicy(settings, data.context_encoding, data.item_encoding)
        return policy.to(data.device).eval().requires_grad_(False)


class ReadLog:
    """The part of the log that a plan reads, and what candidates share of it."""

    def __init__(self, data: PreparedData, plan: AutoPlan, seed: int, progress: Progress) -> None:
        self.data = data
        self._plan, self._seed, self._progress = plan, seed, progress
        self._logged: dict[Folds, LoggedItems] = {}

    def logged(self, folds: Folds) -> LoggedItems:
        """Items and propensities of all rows, which are read once."""
        split = replace(folds, held_out=())
        if split not in self._logged:
            self._logged[split] = LoggedItems.of(self.data.scan(SCAN_ROWS), split)
        return self._logged[split]

    @cached_property
    def rewarded(self) -> KeptRows:
        return keep_rewarded(self.data, self._plan.rewarded_rows, self._progress)

    @cached_property
    def thinned(self) -> KeptRows:
        """Rows of the solved candidate."""
        thinning = self._plan.candidates[MIXED].thinning
        return keep_thinned(self.data, thinning, self._seed, self._progress)

    @cached_property
    def counts(self) -> ItemCounts:
        return count_items(self.data.train, self.data.catalogue, self._progress)

    def start(
        self, stage: Stage, candidate: PolicyCandidate, weights: Sequence[Weights] | None
    ) -> FitStart:
        """What the fit of a candidate's members begins with."""
        kept = self.rewarded if self._plan.candidates[candidate.name].rewarded_rows_only else None
        counts = None
        if self._plan.terms == "sampled":
            counts = self.counts if kept is None else kept.counts
        score = None
        if self._plan.bounded and candidate.predicts_rewards:
            score = _mean_score(self.data.facts)
        return FitStart(stage.number, weights, kept, counts, score)


def _mean_score(facts: LogFacts) -> float:
    """The score of the mean reward."""
    if not facts.binary_reward:
        return facts.mean_reward
    mean = min(max(facts.mean_reward, 1e-6), 1.0 - 1e-6)
    return math.log(mean / (1.0 - mean))


@dataclass(frozen=True)
class FitPart:
    """Part -> weights of its members; may run on any machine, and repeatedly."""

    inputs: AutoInputs
    stage: Stage
    log: ReadLog | None
    """None on other machines: each part opens the log itself."""
    store: MemberStore
    run_path: Path | None
    """The run whose encodings are read on other machines."""
    progress: Progress | None

    def __call__(self, part: Part) -> list[dict[str, Tensor]]:
        inputs, stage = self.inputs, self.stage
        config, plan = inputs.config, inputs.plan
        progress = self.progress or Progress()
        log = self.log
        if log is None:
            opened = plan.limited(open_data(config, progress, self.run_path), config)
            prepared = to_configured_device(opened, config.training)
            log = ReadLog(prepared, plan, config.seed, progress)
        candidate = inputs.candidates[part.candidate]
        folds = inputs.folds if stage.held_out else inputs.folds.none_held_out()
        folds = replace(folds, held_out=tuple(folds.held_out[k] for k in part.members))
        weights = None
        if stage.after is not None:
            started = [inputs.empty(part.candidate, log.data) for _ in part.members]
            for member, policy in zip(part.members, started, strict=True):
                self.store.load(stage.after, part.candidate, member, policy)
            weights = [policy.state_dict() for policy in started]
        if candidate.solved:
            if weights is None or not stage.held_out:
                started = [inputs.empty(part.candidate, log.data) for _ in part.members]
                fit_mixed_members(
                    *(started, folds, log.thinned.rows, log.data.items),
                    binary=log.data.facts.binary_reward,
                    logged=log.logged(folds),
                )
            # A later stage of the race has the same rows, on which the weights are the optimum.
            members = started
        else:
            members = fit_members(
                *(candidate, config, log.data, folds, stage.schedules[part.candidate], progress),
                log.start(stage, candidate, weights),
            )
        return [{k: v.cpu() for k, v in one.state_dict().items()} for one in members]


class CandidateLearner:
    """Fits candidates' members through a mapper and stores them.

    Args:
        inputs: configuration, plan, candidates and folds of the out-of-fold members.
        log: the rows to fit on.
        mapper: runs the parts.
        run: keeps the members; None keeps them in memory and needs a mapper of this process.
    """

    def __init__(
        self,
        inputs: AutoInputs,
        log: ReadLog,
        mapper: Mapper,
        run: RunDirectory | None,
        progress: Progress,
    ) -> None:
        self._inputs, self._log = inputs, log
        self._mapper, self._run, self._progress = mapper, run, progress
        self._store = MemberStore(None if run is None else run.auto)

    def members(self, stage: Stage, names: Sequence[str]) -> dict[str, list[TwoTowerPolicy]]:
        """Fit or restore the members of the named candidates, in the order of the folds."""
        every = range(len(self._inputs.folds.held_out))
        remote = self._mapper.distributed
        apart = remote or self._inputs.plan.members_apart
        groups = [(k,) for k in every] if apart else [tuple(every)]
        parts = [Part(name, members) for name in names for members in groups]
        missing = [part for part in parts if not self._stored(stage, part)]
        fit = FitPart(
            self._inputs,
            stage,
            None if remote else self._log,
            self._store,
            None if self._run is None else self._run.path,
            None if remote else self._progress,
        )
        if remote and missing:
            self._progress.start("fitting members of candidates", len(missing))
        results = self._mapper.map(fit, missing, "objective=auto")
        for part, weights in zip(missing, results, strict=True):
            for k, state in zip(part.members, weights, strict=True):
                member = self._inputs.empty(part.candidate, self._log.data)
                member.load_state_dict(state)
                if self._run is not None:
                    self._run.check_owner()
                self._store.save(stage.name, part.candidate, k, member)
            if remote:
                self._progress.advance(1)
        if remote and missing:
            self._progress.finish()
        return {name: [self._member(stage, name, k) for k in every] for name in names}

    def _member(self, stage: Stage, name: str, member: int) -> TwoTowerPolicy:
        policy = self._inputs.empty(name, self._log.data)
        self._store.load(stage.name, name, member, policy)
        return policy

    def _stored(self, stage: Stage, part: Part) -> bool:
        return all(self._store.has(stage.name, part.candidate, k) for k in part.members)
