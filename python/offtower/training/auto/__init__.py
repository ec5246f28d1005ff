"""`objective=auto`: several learners, cross-fitted, between which held-out rows choose."""

from offtower.training.auto.run import AutoTraining, train_auto

__all__ = ["AutoTraining", "train_auto"]
