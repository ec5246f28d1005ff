"""Fit the members of candidates in this process or as parts on other machines.

A member depends only on its seeds, its rows and its candidate. All members of a candidate may be
fitted in one pass over the log, or each on its own worker, with identical bits.
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
from offtower.training.auto.candidates import PolicyCandidate, Schedule
from offtower.training.auto.folds import Folds
from offtower.training.auto.members import fit_members
from offtower.training.device import to_configured_device

Purpose = Literal["out_of_fold", "refit"]
_WEIGHTS = "member.safetensors"


@dataclass(frozen=True)
class Part:
    """Members of one candidate that are fitted in one pass, by their indices into the folds."""

    candidate: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class FitPart:
    """Part -> weights of its members; may run on any machine, and repeatedly."""

    config: Config
    candidates: Mapping[str, PolicyCandidate]
    folds: Folds
    schedule: Schedule
    data: PreparedData | None
    """None on other machines: each part opens the log itself."""
    run_path: Path | None
    """The run whose encodings are then read."""
    progress: Progress | None

    def __call__(self, part: Part) -> list[dict[str, Tensor]]:
        progress = self.progress or Progress()
        data = self.data
        if data is None:
            opened = open_data(self.config, progress, self.run_path)
            data = to_configured_device(opened, self.config.training)
        folds = replace(self.folds, held_out=tuple(self.folds.held_out[k] for k in part.members))
        candidate = self.candidates[part.candidate]
        members = fit_members(candidate, self.config, data, folds, self.schedule, progress)
        return [{k: v.cpu() for k, v in one.state_dict().items()} for one in members]


class CandidateLearner:
    """Fits candidates' members through a mapper and keeps them in the run's folder.

    Args:
        config, data, candidates, schedule: as for `fit_members`.
        folds: of the out-of-fold members.
        mapper: runs the parts.
        run: keeps the members; None keeps nothing and needs a mapper of this process.
    """

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        candidates: Sequence[PolicyCandidate],
        folds: Folds,
        schedule: Schedule,
        mapper: Mapper,
        run: RunDirectory | None,
        progress: Progress,
    ) -> None:
        self._config, self._data, self._schedule = config, data, schedule
        self._candidates = {one.name: one for one in candidates}
        self._folds = {"out_of_fold": folds, "refit": folds.none_held_out()}
        self._mapper, self._run, self._progress = mapper, run, progress

    def members(self, purpose: Purpose, names: Sequence[str]) -> dict[str, list[TwoTowerPolicy]]:
        """Fit or restore the members of the named candidates, in the order of the folds."""
        every = range(len(self._folds[purpose].held_out))
        remote = self._mapper.distributed
        groups = [(k,) for k in every] if remote else [tuple(every)]
        parts = [Part(name, members) for name in names for members in groups]
        found = {name: [self._empty(name) for _ in every] for name in names}
        missing = [part for part in parts if not self._restored(purpose, part, found)]
        fit = FitPart(
            self._config,
            self._candidates,
            self._folds[purpose],
            self._schedule,
            None if remote else self._data,
            None if self._run is None else self._run.path,
            None if remote else self._progress,
        )
        if remote and missing:
            self._progress.start("fitting members of candidates", len(missing))
        results = self._mapper.map(fit, missing, "objective=auto")
        for part, weights in zip(missing, results, strict=True):
            for k, state in zip(part.members, weights, strict=True):
                member = found[part.candidate][k]
                member.load_state_dict(state)
                if self._run is not None:
                    self._run.check_owner()
                    folder = self._folder(self._run, purpose, part, k)
                    with checked_directory(folder) as temporary:
                        save_weights(temporary / _WEIGHTS, member)
            if remote:
                self._progress.advance(1)
        if remote and missing:
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
