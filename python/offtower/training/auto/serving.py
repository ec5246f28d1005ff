"""Serving settings under which the next evaluation of the learned policy can decide.

The policy of the highest estimated value is often nearly deterministic. Few rows of a log agree
with it, so that neither a validation log nor the next log can show that it is better. A higher
temperature and a share of uniform draws cost some value and make it measurable.

Weights of a mixture are the mixture of the weights, so all settings follow from the held-out rows:

    w = (1 - e) w_t + e / (N pscore)

with w_t at a higher temperature t, e the uniform share and N the number of eligible items.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from offtower.config import ServingConfig
from offtower.training.auto.choice import Choice
from offtower.training.auto.estimates import CandidateEstimate, unseen_second_moment, whole_error
from offtower.training.auto.held_out import CandidatePolicy, HeldOutRows

Array = NDArray[np.float64]

UNIFORM = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
POWER = 0.8
"""Probability with which the next evaluation should show the estimated gain."""


@dataclass(frozen=True)
class Requirement:
    """What the next evaluation needs.

    Attributes:
        rows: of the log that it reads.
        effective_sample_size: at least (the gate's).
        confidence: of its two-sided interval.
    """

    rows: int
    effective_sample_size: float
    confidence: float


@dataclass(frozen=True)
class ServedSettings:
    """One way to serve the chosen policy, estimated on held-out rows.

    Attributes:
        temperature, uniform: of the section `serving`.
        value: estimated value.
        gain: over the logging policy.
        gain_error: standard error of the gain in the next evaluation, the larger one of the doubly
            robust and the self-normalized estimator.
        effective_sample_size: of the weights in the next evaluation.
    """

    temperature: float
    uniform: float
    value: float
    gain: float
    gain_error: float
    effective_sample_size: float


@dataclass(frozen=True)
class ServingProposal:
    """The settings of the highest value among those that the next evaluation can decide on.

    Attributes:
        sharpest: the chosen policy as it is.
        settings: None where no setting suffices.
        loss: of value against the policy as it is.
    """

    sharpest: ServedSettings
    settings: ServedSettings | None

    @property
    def loss(self) -> float | None:
        return None if self.settings is None else self.sharpest.value - self.settings.value

    @property
    def text(self) -> str:
        """A sentence for the user."""
        found, sharp = self.settings, self.sharpest
        if found is None:
            return (
                "no temperature and uniform share makes this policy's gain measurable on a log of "
                f"this size (effective sample size {sharp.effective_sample_size:,.0f} as trained): "
                "log more rows, or let a share of the traffic explore"
            )
        serving = ServingConfig(temperature=found.temperature, uniform=found.uniform)
        if serving.is_trained_policy:
            return (
                "an evaluation on a log of this size can decide on the policy as trained "
                f"(effective sample size {found.effective_sample_size:,.0f})"
            )
        return (
            f"serve it with {serving.text} to let an evaluation on a log of this size decide: "
            f"effective sample size {found.effective_sample_size:,.0f} instead of "
            f"{sharp.effective_sample_size:,.0f}, for a value of {found.value:.4g} instead of "
            f"{sharp.value:.4g}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "as_trained": asdict(self.sharpest),
            "proposed": None if self.settings is None else asdict(self.settings),
            "loss": self.loss,
            "text": self.text,
        }


def propose_serving(choice: Choice, rows: HeldOutRows, requirement: Requirement) -> ServingProposal:
    """Find the setting of the highest value that satisfies the requirement.

    The gain counts as measurable if it is at least (z_confidence + z_power) of its standard errors.
    Without a gain to show, an effective sample size as required suffices.
    """
    chosen = choice.chosen
    options = [
        one
        for one in choice.estimates[chosen.name]
        if one.inverse_temperature <= chosen.inverse_temperature
        # A temperature of serving would soften the base measure too.
        and (chosen.name not in rows.based or one is chosen)
    ]
    sharpest = _served(chosen, chosen, 0.0, rows, requirement)
    needed = float(ndtri(0.5 + requirement.confidence / 2.0) + ndtri(POWER))
    grid = [
        _served(chosen, one, share, rows, requirement)
        for one in reversed(options)
        for share in UNIFORM
    ]
    enough = [
        one
        for one in grid
        if one.effective_sample_size >= requirement.effective_sample_size
        and (choice.keep_logging or one.gain >= needed * one.gain_error)
    ]
    return ServingProposal(sharpest, max(enough, key=lambda one: one.value, default=None))


def _served(
    chosen: CandidateEstimate,
    softer: CandidateEstimate,
    share: float,
    rows: HeldOutRows,
    requirement: Requirement,
) -> ServedSettings:
    policy = CandidatePolicy(softer.name, softer.inverse_temperature)
    uniform = 1.0 / (rows.pscore * rows.eligible_items)
    mean = float(rows.mean(rows.reward))
    weight = (1.0 - share) * rows.terms[policy].weight + share * uniform
    # The mean reward as the control variate of uniform draws.
    contribution = (1.0 - share) * softer.contribution + share * (
        uniform * (rows.reward - mean) + mean
    )
    unseen = (1.0 - share) ** 2 * unseen_second_moment(rows, policy)
    second_moment = float(rows.mean(np.square(weight))) + unseen
    value, mean_weight = float(rows.mean(contribution)), float(rows.mean(weight))
    gain = contribution - rows.reward
    # The next evaluation may have no reward model as good as this one: influence on SNIPS.
    self_normalized = weight * (rows.reward - value) / max(mean_weight, 1e-30) - rows.reward
    residual = float(rows.mean(np.square(rows.reward - rows.action_reward)))
    error = max(
        whole_error(gain, rows),
        whole_error(self_normalized, rows),
        float(np.sqrt(residual * unseen / rows.size)),
    )
    return ServedSettings(
        temperature=chosen.inverse_temperature / softer.inverse_temperature,
        uniform=share,
        value=value,
        gain=float(rows.mean(gain)),
        gain_error=error * float(np.sqrt(rows.size / requirement.rows)),
        effective_sample_size=requirement.rows * mean_weight**2 / second_moment,
    )
