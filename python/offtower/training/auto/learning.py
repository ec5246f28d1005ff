"""Learning the members of candidates: here, or as parts on other machines.

A member depends on its seeds, its rows and its candidate alone. So all of a candidate's may be
learned in one pass over the log, or each for itself where there are workers, with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from offtower.checksums import checked_directory, is_complete, verify_directory
from offtower.config import Config
from offtower.mapping import Mapper
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_weights, save_weights
from offtower.prepare import PreparedData, open_data
from offtower.progress import Progress
from offtower.run_directory import RunDirectory
from offtower.training.auto.candidates import Candidate, Schedule
from offtower.training.auto.folds import Folds
from offtower.training.auto.members import fit_members
from offtower.training.device import place

Purpose = Literal["judged", "refit"]
_WEIGHTS = "member.safetensors"


@dataclass(frozen=True)
class Part:
    """Members of one candidate that are learned in one pass, by their places in the folds."""

    candidate: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class LearnPart:
    """Part -> weights of its members; may run anywhere, and again."""

    config: Config
    candidates: Mapping[str, Candidate]
    folds: Folds
    schedule: Schedule
    data: PreparedData | None
    """None where the parts run elsewhere: each opens the log for itself, and learns on CPUs."""
    run_path: Path | None
    """Of the run, whose encodings are read then."""
    progress: Progress | None

    def __call__(self, part: Part) -> list[dict[str, Tensor]]:
        progress = self.progress or Progress()
        data = self.data
        if data is None:
            opened = open_data(self.config, progress, self.run_path)
            data = place(opened, self.config.training)
        folds = replace(self.folds, held_out=tuple(self.folds.held_out[k] for k in part.members))
        candidate = self.candidates[part.candidate]
        members = fit_members(candidate, self.config, data, folds, self.schedule, progress)
        return [{k: v.cpu() for k, v in one.state_dict().items()} for one in members]


class CandidateLearner:
    """Learns candidates' members by a mapper, and keeps them in the run's folder, so that a run
    that was killed goes on.

    Args:
        config, data, candidates, schedule: as `fit_members` takes them.
        folds: of the members that are judged.
        mapper: runs the parts.
        run: where members are kept; None keeps nothing, and then the mapper works in this process.
    """

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        candidates: Sequence[Candidate],
        folds: Folds,
        schedule: Schedule,
        mapper: Mapper,
        run: RunDirectory | None,
        progress: Progress,
    ) -> None:
        self._config, self._data, self._schedule = config, data, schedule
        self._candidates = {one.name: one for one in candidates}
        self._folds = {"judged": folds, "refit": folds.none_held_out()}
        self._mapper, self._run, self._progress = mapper, run, progress

    def __call__(self, purpose: Purpose, names: Sequence[str]) -> dict[str, list[TwoTowerPolicy]]:
        """The members of each candidate that is named, in the folds' order."""
        every = range(len(self._folds[purpose].held_out))
        away = self._mapper.distributed
        groups = [(k,) for k in every] if away else [tuple(every)]
        parts = [Part(name, members) for name in names for members in groups]
        found = {name: [self._empty(name) for _ in every] for name in names}
        missing = [part for part in parts if not self._restored(purpose, part, found)]
        learn = LearnPart(
            self._config,
            self._candidates,
            self._folds[purpose],
            self._schedule,
            None if away else self._data,
            None if self._run is None else self._run.path,
            None if away else self._progress,
        )
        if away and missing:
            self._progress.start("learning members of candidates", len(missing))
        results = self._mapper.map(learn, missing, "objective=auto")
        for part, weights in zip(missing, results, strict=True):
            for k, state in zip(part.members, weights, strict=True):
                member = found[part.candidate][k]
                member.load_state_dict(state)
                if self._run is not None:
                    self._run.check_owner()
                    folder = self._folder(self._run, purpose, part, k)
                    with checked_directory(folder) as temporary:
                        save_weights(temporary / _WEIGHTS, member)
            if away:
                self._progress.advance(1)
        if away and missing:
            self._progress.finish()
        return found

    def _empty(self, name: str) -> TwoTowerPolicy:
        data, settings = self._data, self._candidates[name].policy
        policy = TwoTowerPolicy(settings, data.context_encoding, data.item_encoding)
        return policy.to(data.device).eval().requires_grad_(False)

    def _restored(
        self, purpose: Purpose, part: Part, found: dict[str, list[TwoTowerPolicy]]
    ) -> bool:
        if self._run is None:
            return False
        folders = [self._folder(self._run, purpose, part, k) for k in part.members]
        if not all(is_complete(folder) for folder in folders):
            return False
        for k, folder in zip(part.members, folders, strict=True):
            verify_directory(folder, "remove that folder, and its member is learned again")
            load_weights(folder / _WEIGHTS, found[part.candidate][k])
        return True

    @staticmethod
    def _folder(run: RunDirectory, purpose: Purpose, part: Part, member: int) -> Path:
        return run.auto / purpose / part.candidate / f"member_{member}"
