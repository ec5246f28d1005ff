"""Section `evaluation`: estimators, estimator selection, and the gate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass as frozen_dataclass
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from offtower.config.learning import RewardModelConfig
from offtower.config.strict import STRICT
from offtower.data.durations import parse_duration
from offtower.errors import ConfigError


@frozen_dataclass(frozen=True)
class GateOptions:
    """Requirements of a verdict.

    Attributes:
        margin: V(new) - V(logging) must exceed it, in units of reward.
        min_rows, min_users, min_effective_sample_size: an asymptotic interval needs at least these.
        min_rewarded_rows: rows whose reward is not 0, at least.
        max_pareto_k: a heavier tail of the weights casts doubt (`pareto_shape`).
        max_mean_weight_z, max_mean_weight_error: propensities are in doubt where the mean weight
            differs from 1 by more than both, in standard errors and absolutely, or where the
            weighted predictions are off by more standard errors than that, and by enough to
            explain `max_balance_share` of the difference.
        max_missing_support: tolerated share of target draws without support in the log.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    margin: float = 0.0
    min_rows: int = 100
    min_rewarded_rows: int = 10
    min_users: int = 30
    min_effective_sample_size: float = 100.0
    max_pareto_k: float = 0.7
    max_mean_weight_z: float = 4.0
    max_mean_weight_error: float = 0.02
    max_balance_share: float = 0.25
    max_missing_support: float = 0.01

    def __post_init__(self) -> None:
        if not math.isfinite(self.margin):
            raise ConfigError(f"the gate's margin must be a number, but is {self.margin}")
        for name in ("max_pareto_k", "max_mean_weight_z", "max_mean_weight_error"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(
                    f"the gate's {name} must not be negative, but is {getattr(self, name)}"
                )


@frozen_dataclass(frozen=True)
class TimeOptions:
    """Values over time, for logs with timestamps.

    Attributes:
        period: length of a period in the report, such as 7d or 12h, or a number where timestamps
            are no dates; null takes the shortest of the calendar of which the log has at most 16,
            with at least 30 rows in the mean.
        horizon: periods after the log whose value is forecast.
        correlated: widen all intervals for rows that are correlated in time; null does so where a
            test finds that they are.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    period: str | float | None = None
    horizon: int = 1
    correlated: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.period, str):
            parse_duration(self.period, "evaluation.time.period")
        elif self.period is not None and not 0.0 < self.period < math.inf:
            raise ConfigError(
                f"evaluation.time.period must be above 0, but is {self.period}: give a duration "
                "such as 7d"
            )
        if self.horizon < 1:
            raise ConfigError(
                f"evaluation.time.horizon must be at least 1 period, but is {self.horizon}"
            )


@dataclass(config=STRICT)
class EstimatorConfig:
    """An estimator with its parameter. `snips` alone is short for {name: snips}."""

    name: str
    """`offtower doctor` lists them."""
    max_weight: float | Literal["slope"] | None = None
    """clipped_ips, clipped_dr. "slope", here and below: chosen by SLOPE on the log's first rows."""
    threshold: float | Literal["slope"] | None = None
    """switch_dr."""
    shrinkage: float | Literal["slope"] | None = None
    """dros."""
    lambda_: float | Literal["slope"] | None = None
    """sub_gaussian_ips, sub_gaussian_dr, log_smoothing."""
    interaction: Literal["auto", "standard", "cascade", "independent"] = "auto"
    """What a reward in a slate may depend on: the whole slate, the items down to its position, its
    own item alone. auto is cascade for conditional pscores, standard for those of whole slates."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, content: Any) -> Any:
        return {"name": content} if isinstance(content, str) else content


SelectionModel = Literal["linear", "trees", "two_tower"]


def _named(content: Any) -> Any:
    """A mapping by text: YAML reads an unquoted name such as 1 as a number."""
    if not isinstance(content, Mapping):
        return content
    return {str(name): value for name, value in content.items()}


ByName = Annotated[dict[str, str], BeforeValidator(_named), Field(min_length=1)]


@dataclass(config=STRICT)
class SelectionConfig:
    """Estimator selection (`offtower evaluate --select`)."""

    models: tuple[SelectionModel, ...] = ("linear", "trees", "two_tower")
    """Reward models of the candidates, fitted on the run's training log where the run has none of
    the kind."""
    fit_rows: int = Field(default=200_000, ge=100)
    """Rows of the training log that `linear` and `trees` are fitted on, at most."""
    max_rows: int = Field(default=2_000_000, ge=100)
    """Longest log that is accepted: a few numbers a row are kept in memory."""
    logging_run: str | None = None
    """Run directory whose policy logged the rows, where one did: PAS-IF then draws from it and can
    rank candidates with a reward model. Without it only logged propensities are known."""
    logging_runs: ByName | None = None
    """For a log of several behavior policies: the run directory of each, by its value in the column
    behavior_policy. The heuristic needs them; PAS-IF draws from each row's own policy. They are
    checked against the logged propensities."""
    logging_columns: ByName | None = None
    """In place of logging_runs, for the heuristic: the log's column with each behavior policy's
    propensity of the logged item. Candidates with a reward model are then not ranked."""
    logging_tolerance: float = Field(default=0.02, ge=0.0)
    """Largest relative distance of logging_runs or logging_columns from the logged propensities."""
    draws: int = Field(default=100, ge=2)
    """Draws from the logging policy for each row, with logging_run or logging_runs. A catalogue of
    no more items is summed over instead."""
    draw_rows: int = Field(default=20_000, ge=100)
    """Rows that PAS-IF uses draws on: evenly spaced ones of a longer log."""
    share: float = Field(default=0.2, gt=0.0, lt=1.0)
    """PAS-IF's k, the expected share of the pseudo-target part."""
    importance_fit: Literal["exact", "network"] = "exact"
    """How PAS-IF's split is fitted: a root-find, or the published network (slow: minutes for
    2,000 rows and 10 items), which needs logging_run or logging_runs and the whole catalogue."""
    network_steps: int = Field(default=5_000, ge=1)
    """The network's steps of Adam on all rows, for each lambda of its grid."""
    repetitions: int = Field(default=100, ge=2)
    """PAS-IF's splits."""


@dataclass(config=STRICT)
class EvaluationConfig:
    """How `offtower evaluate` estimates and decides."""

    estimators: tuple[EstimatorConfig, ...] = (
        EstimatorConfig("ips"),
        EstimatorConfig("snips"),
        EstimatorConfig("dm"),
        EstimatorConfig("dr"),
    )
    """Names, or {name: clipped_ips, max_weight: 10}."""
    decide_by: str = "auto"
    """The estimator of the verdict; auto is dr where there is a reward model, else snips; reg_dr or
    reg_ips where `estimators` has them."""
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)
    interval: Literal["auto", "gamma", "normal", "bootstrap", "bernstein"] = "auto"
    """Method of the table and the verdict; auto is gamma. report.json always has gamma, normal and
    bootstrap too."""
    max_weight: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Largest weight that can occur: at most 1 / (least logging probability). bernstein needs it;
    gamma is narrower with it."""
    replicates: int | None = Field(default=None, ge=20)
    """Of the bootstrap; null takes what the confidence needs, 500 at least."""
    by_user: bool | None = None
    """Cluster rows by user; null does so where the log has users."""
    position_weights: tuple[float, ...] | None = None
    """Of slates, one number for each position from the top: the value of a round is the sum of its
    rewards times these, under every estimator. null is 1 everywhere."""
    gate: GateOptions = field(default_factory=GateOptions)
    propensities: Literal["logged", "balanced", "estimate"] = "logged"
    """balanced: for a log of several behavior policies, the mean of all their propensities of the
    logged item by their shares of the rows; needs selection.logging_runs or logging_columns.
    estimate: fit a calibrated model to a log without propensities (catalogues of up to 5,000
    items). No interval covers its error, and every output says so."""
    clusters: int | str | None = None
    """Clusters of items for mips: a category of the catalogue, or a number of clusters, found by
    k-means over the item embeddings of the first policy."""
    expected_reward: Literal["exact", "draws"] = "exact"
    """Of a reward model under a policy: a sum over all items, or an unbiased mean over `draws`
    items drawn from the policy, whose noise is part of every interval. Reward models that do not
    factor use draws anyway where rows x items is large."""
    draws: int = Field(default=8, ge=1)
    """Items drawn from the evaluated policy for each row."""
    batch_rows: int = Field(default=4096, ge=1)
    time: TimeOptions = field(default_factory=TimeOptions)
    reward_model: RewardModelConfig | None = None
    """The reward model of DM and DR; the training's own where this is null."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
