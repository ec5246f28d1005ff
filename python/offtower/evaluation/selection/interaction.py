"""Choice of what a reward in a slate may depend on, among nested assumptions.

Every policy's value is estimated under each assumption on the same rounds. The strongest one is
taken whose estimate agrees with those under all weaker ones: the principle of SLOPE (Su, Srinath,
Krishnamurthy, ICML 2020), with paired differences and the order given by the assumptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.estimators import IPS, Estimator
from offtower.evaluation.intervals.statistics import Statistics, collect
from offtower.evaluation.rows import Array, EvaluationRows
from offtower.slates import Interaction

ORDER: tuple[Interaction, ...] = ("standard", "cascade", "independent")
"""From the weakest assumption to the strongest; each contains the one before it."""
_ASSUMES = {
    "cascade": "a reward does not depend on later items",
    "independent": "a reward depends on the item at its position alone",
}
_ROUNDING = 1e-4
"""Relative difference of estimates that float32 log-probabilities explain."""


@dataclass(frozen=True)
class InteractionChoice:
    """The chosen interaction.

    values: estimates by interaction. rejected: by interaction not chosen, the reason.
    """

    chosen: Interaction
    values: dict[Interaction, float]
    rejected: dict[Interaction, str]

    def sentences(self) -> list[str]:
        """Say which interaction to read, and why none of the others."""
        return [
            f"of the interactions, '{self.chosen}' is chosen and '{name}' is not: {reason}"
            for name, reason in self.rejected.items()
        ]


@dataclass(frozen=True)
class InteractionSums:
    """Mergeable sums over the rounds of a policy, from which an interaction is chosen.

    names: the K interactions, in the order `ORDER`. statistics: of their terms by round, and of the
    difference of each pair (weaker, stronger).
    """

    names: tuple[Interaction, ...]
    statistics: Statistics

    @classmethod
    def of(
        cls, rows: Mapping[Interaction, EvaluationRows], estimator: Estimator | None = None
    ) -> InteractionSums:
        """Sums of the same rounds with the weights of each interaction; by IPS by default.

        Raises:
            OfftowerError: no or unknown interactions, or other rounds.
        """
        names = tuple(name for name in ORDER if name in rows)
        if not names or len(names) != len(rows):
            raise OfftowerError(f"rows must be some of {', '.join(ORDER)}, got {', '.join(rows)}")
        estimator = estimator or IPS()
        parts = {name: estimator.contributions(rows[name]) for name in names}
        if len({part.size for part in parts.values()}) > 1:
            raise OfftowerError("the interactions need the same rounds")
        return cls._of_parts(parts)

    @classmethod
    def of_slates(cls, rows: EvaluationRows) -> InteractionSums | None:
        """Sums of IPS under `cascade` and `standard`; None unless the rows are slates with both."""
        if rows.round is None or rows.earlier_weight is None or rows.slate_weight is None:
            return None
        weights: dict[Interaction, Array] = {
            "standard": rows.slate_weight,
            "cascade": rows.importance_weight,
        }
        return cls._of_parts(
            {name: rows.summed(weight * rows.reward) for name, weight in weights.items()}
        )

    @classmethod
    def _of_parts(cls, parts: Mapping[Interaction, Array]) -> InteractionSums:
        """Of the terms (rounds,) of each interaction, in the order `ORDER`."""
        gaps = [parts[strong] - parts[weak] for weak, strong in combinations(parts, 2)]
        terms = np.stack([*parts.values(), *gaps], axis=1)
        units = EvaluationRows(importance_weight=np.ones(len(terms)), reward=terms[:, 0])
        return cls(tuple(parts), collect(terms, units))

    def merge(self, other: InteractionSums) -> InteractionSums:
        """Sums over both shards' rounds."""
        return InteractionSums(self.names, self.statistics.merge(other.statistics))

    def choose(self, width: float = 2.0) -> InteractionChoice:
        """Choose an interaction; width as in `choose_interaction`."""
        mean, names = self.statistics.mean, self.names
        error = np.sqrt(np.diagonal(self.statistics.covariance) / self.statistics.n)
        pairs = {pair: len(names) + i for i, pair in enumerate(combinations(names, 2))}
        chosen: Interaction = names[0]
        rejected: dict[Interaction, str] = {}
        for strong in names[1:]:
            for weak in names[: names.index(strong)]:
                gap, spread = mean[pairs[weak, strong]], error[pairs[weak, strong]]
                rounding = _ROUNDING * abs(mean[names.index(weak)])
                if weak not in rejected and abs(gap) > max(width * spread, rounding):
                    rejected[strong] = (
                        f"it assumes that {_ASSUMES[strong]}; its value differs by "
                        f"{gap:+.4g} ± {spread:.2g} from '{weak}', which does not"
                    )
                    break
            else:
                chosen = strong
        for name in names:
            if name != chosen and name not in rejected:
                rejected[name] = f"it agrees with '{chosen}', whose variance is smaller"
        values = {name: float(value) for name, value in zip(names, mean, strict=False)}
        return InteractionChoice(chosen, values, rejected)


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
    return InteractionSums.of(rows, estimator).choose(width)
