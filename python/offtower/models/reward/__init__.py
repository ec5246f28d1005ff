"""Reward models q(x, a): dense (scikit-learn) and factored (two towers), cross-fitted."""
