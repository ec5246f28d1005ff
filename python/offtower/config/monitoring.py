"""Section `monitor`: thresholds of `offtower monitor`."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from offtower.config.strict import STRICT
from offtower.data.durations import parse_duration


@dataclass(config=STRICT)
class MonitorConfig:
    """What a served log may differ by before `offtower monitor` exits with 1.

    Statistics breach a threshold only where their confidence bound does.
    """

    alpha: float = Field(default=0.01, gt=0.0, lt=1.0)
    """Error over all checks: a quarter each for weights, features, unknown values and rewards. For
    weights and values it holds over all readings of a growing log, for the others at each."""
    period: str | float = "1d"
    """Length of a day of the report, such as 1d or 6h; a number where timestamps are no dates."""
    max_weight_error: float = Field(default=0.05, ge=0.0)
    """Distance of the mean weight from 1."""
    max_weight: float = Field(default=100.0, gt=1.0, allow_inf_nan=False)
    """Largest weight that right propensities can give, on which the upper bound of the mean weight
    rests; a larger one in the log withdraws that bound."""
    weight_rows: int = Field(default=100_000, ge=100)
    """Rows whose weight is computed, each at the cost of a pass over the items: a random sample of
    a longer log."""
    max_unequal_propensities: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of the rows that this run's exports served whose propensity is not the policy's."""
    max_feature_drift: float = Field(default=0.1, ge=0.0, le=1.0)
    """Distance of a feature's distribution from that of the training log: Kolmogorov-Smirnov for
    numbers, total variation for categories."""
    max_unknown: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of rows with a value of a feature that training did not see."""
    min_items_shown: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the catalogue that the log shows."""
    max_unknown_items: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of the log's items that the catalogue lacks."""
    max_bad_rows: float = Field(default=0.001, ge=0.0, le=1.0)
    """Share of rows that break the log's schema."""
    min_value: float | None = None
    """Mean reward, over the log and in each day; null for none."""
    max_value_fall: float | None = Field(default=0.2, ge=0.0, le=1.0)
    """Relative fall of the mean reward below that of the training log; null for none."""
    max_reward_drift: float = Field(default=0.2, ge=0.0)
    """Relative change of the mean reward within the log, where a test for drift finds one."""

    @model_validator(mode="after")
    def _check(self) -> MonitorConfig:
        if isinstance(self.period, str):
            parse_duration(self.period, "monitor.period")
        elif not 0.0 < self.period < float("inf"):
            raise ValueError(f"period must be above 0, got {self.period:g}")
        return self
