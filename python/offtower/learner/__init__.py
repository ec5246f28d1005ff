"""The in-memory learner, in the conventions of scikit-learn and Open Bandit Pipeline."""

from offtower.learner.feedback import logged_feedback
from offtower.learner.learner import NotFittedError, TwoTowerPolicyLearner
from offtower.learner.scoring import OffPolicyScorer

__all__ = ["NotFittedError", "OffPolicyScorer", "TwoTowerPolicyLearner", "logged_feedback"]
