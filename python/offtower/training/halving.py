"""Successive halving: train all trials a little, and only the best of them further.

Trials are compared when all of a rung have ended, so that the choice does not depend on the number
of workers or on their speed, and a search that was killed continues to the same choice.
Source: Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
optimization"; Li et al. 2020, "A system for massively parallel hyperparameter tuning", compares
trials as they arrive instead (ASHA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from offtower.config import TrainingConfig


@dataclass(frozen=True)
class Rung:
    """One stage of a search.

    Attributes:
        share: of a trial's epochs that have been trained at its end.
        trials: number of trials that take part.
    """

    share: Fraction
    trials: int

    def epochs(self, settings: TrainingConfig) -> int:
        """Epochs of a trial at the end of the rung: whole validations, at least one."""
        every = settings.validate_every_epochs
        validations = -(-self.share * settings.epochs // every)
        return min(settings.epochs, int(validations) * every)


def rungs(trials: Sequence[TrainingConfig], factor: int) -> list[Rung]:
    """Plan the rungs of a search.

    The last rung trains to the end; each one before it to 1 / `factor` of the next one's epochs,
    with `factor` times as many trials. Rungs that would end with the same epochs are one.

    Args:
        trials: settings of all trials.
        factor: one in `factor` trials goes on to the next rung; 1 trains all to the end.
    """
    found: list[Rung] = []
    share, left = Fraction(1), len(trials)
    while factor > 1 and left >= factor:
        share, left = share / factor, left // factor
    left = len(trials)
    while share < 1:
        rung, after = Rung(share, left), Rung(share * factor, left)
        if any(rung.epochs(one) < after.epochs(one) for one in trials):
            found.append(rung)
            left = -(-left // factor)
        share *= factor
    return [*found, Rung(Fraction(1), left)]


def best(lows: Sequence[float | None], count: int) -> list[int]:
    """Positions of the `count` largest bounds, in their order; trials without one failed."""
    usable = [(-low, index) for index, low in enumerate(lows) if low is not None]
    return sorted(index for _, index in sorted(usable)[:count])
