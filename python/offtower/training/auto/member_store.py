"""Fitted members by stage, in the run's folder or in memory."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from offtower.checksums import checked_directory, is_complete, verify_directory
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_weights, save_weights

_WEIGHTS = "member.safetensors"

Weights = dict[str, Tensor]


class MemberStore:
    """Weights of members.

    Args:
        path: their folder; None keeps them in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._kept: dict[tuple[str, str, int], Weights] = {}

    def has(self, stage: str, candidate: str, member: int) -> bool:
        if self._path is None:
            return (stage, candidate, member) in self._kept
        return is_complete(self._folder(self._path, stage, candidate, member))

    def save(self, stage: str, candidate: str, member: int, policy: TwoTowerPolicy) -> None:
        if self._path is None:
            self._kept[stage, candidate, member] = policy.state_dict()
            return
        with checked_directory(self._folder(self._path, stage, candidate, member)) as temporary:
            save_weights(temporary / _WEIGHTS, policy)

    def load(self, stage: str, candidate: str, member: int, policy: TwoTowerPolicy) -> None:
        """Load weights into `policy`; those in memory are shared with it."""
        if self._path is None:
            policy.load_state_dict(self._kept[stage, candidate, member], assign=True)
            return
        folder = self._folder(self._path, stage, candidate, member)
        verify_directory(folder, "remove that folder, and its member is learned again")
        load_weights(folder / _WEIGHTS, policy)

    @staticmethod
    def _folder(path: Path, stage: str, candidate: str, member: int) -> Path:
        return path / stage / candidate / f"member_{member}"
