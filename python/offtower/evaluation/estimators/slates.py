"""Estimators under other assumptions on what a reward in a slate depends on."""

from __future__ import annotations

from dataclasses import dataclass

from offtower.evaluation.estimators.base import Estimator
from offtower.evaluation.rows import Array, EvaluationRows


@dataclass(frozen=True)
class Standard(Estimator):
    """An estimator with the weights of whole slates: a reward may depend on every position.

    V = mean over rounds of w_slate sum_k r_k for IPS (Precup, Sutton, Singh, ICML 2000). Unbiased
    wherever the cascade form is, of larger variance. A doubly robust one keeps the expectations
    f(w_{1:k-1}) E_pi[q_k | x, a_<k] of the cascade form, which are unbiased under both.

    base: IPS, SNIPS, DR or another estimator, in its cascade form.
    """

    base: Estimator

    def __post_init__(self) -> None:
        # Of an instance: those of the base are declared by its class.
        declared = ("label", "needs_reward_model", "uses_weight", "num_terms", "consistent")
        for name in (*declared, "controls"):
            value = getattr(self.base, name)
            object.__setattr__(self, name, f"standard_{value}" if name == "label" else value)

    @property
    def name(self) -> str:
        return f"standard_{self.base.name}"

    def terms(self, rows: EvaluationRows) -> Array:
        return self.base.terms(rows.standard())

    def combine(self, mean: Array) -> Array:
        return self.base.combine(mean)

    def gradient(self, mean: Array) -> Array:
        return self.base.gradient(mean)
