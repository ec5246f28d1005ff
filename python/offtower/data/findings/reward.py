"""The mean reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from offtower.data.columns import as_float_array
from offtower.data.findings.base import Check, Finding, LogFacts, LogPart
from offtower.data.moments import Moments


@dataclass(frozen=True)
class MeanReward(Check):
    """Moments of the good rows' rewards, each row counted alone: the rows of a user or round, which
    are correlated, make the error of the mean larger than this one."""

    reward: Moments

    @classmethod
    def of(cls, part: LogPart) -> Self:
        return cls(Moments.of(as_float_array(part.good.column(part.schema.reward))))

    def merge(self, other: Self) -> Self:
        return type(self)(self.reward.merge(other.reward))

    def findings(self, facts: LogFacts) -> list[Finding]:
        reward = self.reward
        if reward.count == 0:
            return [Finding("error", "reward", "no row is good, so there is no mean")]
        mean, error = reward.mean, reward.std_error
        equal = reward.square == 0
        kept = "" if facts.schema.weight is None else "of the kept rows "
        correlated = facts.schema.user_id is not None or facts.schema.round_id is not None
        alone = " of independent rows" if correlated else ""
        return [
            Finding(
                "warning" if equal else "info",
                "reward",
                f"mean reward {kept}{mean:.5g} (standard error{alone} {error:.2g}; 95% interval "
                f"{mean - 1.96 * error:.5g} to {mean + 1.96 * error:.5g}), "
                f"from {reward.smallest:g} to {reward.largest:g}"
                + (": all rewards are equal, nothing to learn" if equal else ""),
                {
                    "mean": mean,
                    "std_error": error,
                    "low": mean - 1.96 * error,
                    "high": mean + 1.96 * error,
                },
            )
        ]
