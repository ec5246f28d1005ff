"""`objective=auto`: cross-fitted candidates, and a choice between them on held-out rows."""

from offtower.training.auto.run import AutoTraining, train_auto

__all__ = ["AutoTraining", "train_auto"]
