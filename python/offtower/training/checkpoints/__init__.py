"""Checkpoints, from which a run resumes with the same bits."""

from offtower.training.checkpoints.progression import Progression
from offtower.training.checkpoints.state import OwnedRows
from offtower.training.checkpoints.store import CheckpointStore

__all__ = ["CheckpointStore", "OwnedRows", "Progression"]
