"""Choice of what a reward in a slate may depend on, among nested assumptions.

Every policy's value is estimated under each assumption on the same rounds. The strongest one is
taken whose estimate agrees with those under all weaker ones: the principle of SLOPE (Su, Srinath,
Krishnamurthy, ICML 2020), with paired differences and the order given by the assumptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.estimators import IPS, Estimator
from offtower.evaluation.rows import EvaluationRows
from offtower.slates import Interaction

ORDER: tuple[Interaction, ...] = ("standard", "cascade", "independent")
"""From the weakest assumption to the strongest; each contains the one before it."""
_ASSUMES = {
    "cascade": "a reward does not depend on later items",
    "independent": "a reward depends on the item at its position alone",
}


@dataclass(frozen=True)
class InteractionChoice:
    """The chosen interaction.

    values: estimates by interaction. rejected: by interaction not chosen, the reason.
    """

    chosen: Interaction
    values: dict[Interaction, float]
    rejected: dict[Interaction, str]


def choose_interaction(
    rows: Mapping[Interaction, EvaluationRows],
    estimator: Estimator | None = None,
    *,
    width: float = 2.0,
) -> InteractionChoice:
    """Choose among the interactions of one policy's rows.

    Args:
        rows: the same rounds with the weights of each interaction as `importance_weight`.
        estimator: IPS by default.
        width: standard errors of a paired difference beyond which an assumption is rejected.

    Raises:
        OfftowerError: no or unknown interactions, or other rounds.
    """
    known = [name for name in ORDER if name in rows]
    if not known or len(known) != len(rows):
        raise OfftowerError(f"rows must be some of {', '.join(ORDER)}, got {', '.join(rows)}")
    estimator = estimator or IPS()
    parts = {name: estimator.contributions(rows[name]) for name in known}
    if len({part.size for part in parts.values()}) > 1:
        raise OfftowerError("the interactions need the same rounds")
    values = {name: float(part.mean()) for name, part in parts.items()}
    chosen, rejected = known[0], {}
    for strong in known[1:]:
        reason = None
        for weak in known[: known.index(strong)]:
            gap = parts[strong] - parts[weak]
            error = float(gap.std(ddof=1) / np.sqrt(gap.size))
            distance = abs(float(gap.mean()))
            if weak not in rejected and distance > width * error and distance > 1e-12:
                reason = (
                    f"it assumes that {_ASSUMES[strong]}; its value differs by "
                    f"{gap.mean():+.4g} ± {error:.2g} from '{weak}', which does not"
                )
                break
        if reason is None:
            chosen = strong
        else:
            rejected[strong] = reason
    for name in known:
        if name != chosen and name not in rejected:
            rejected[name] = f"it agrees with '{chosen}', whose variance is smaller"
    return InteractionChoice(chosen, values, rejected)
