"""All that a run needs to go on as if it had never stopped."""

from offtower.training.checkpoints.progression import Progression
from offtower.training.checkpoints.state import OwnedRows
from offtower.training.checkpoints.store import CheckpointStore

__all__ = ["CheckpointStore", "OwnedRows", "Progression"]
