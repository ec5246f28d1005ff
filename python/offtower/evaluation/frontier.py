"""The frontier of a served policy: its value against how well it can be evaluated, and exploration.

A sharp policy is worth more and is harder to evaluate: few rows of the log agree with it, and its
own log will support few others. Every point is estimated from the log, as `evaluate` does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from offtower.atomic import write_text
from offtower.checksums import checked_text, is_checked_text
from offtower.config import Config, ServingConfig, to_yaml
from offtower.config.serving import changed_serving
from offtower.data.lease import Lease
from offtower.data.ledger import record
from offtower.data.location import AnyPath
from offtower.errors import ConfigError
from offtower.evaluation.result import PolicyEvaluation
from offtower.evaluation.run import LogEvaluation, evaluate_runs
from offtower.execution import LOCAL, Execution
from offtower.models.store import policy_digest
from offtower.run_directory import RunDirectory

TEMPERATURES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
UNIFORM = (0.0, 0.02, 0.1, 0.3)
MAX_POINTS = 200
"""Settings of a grid, at most: each is a column of every estimate."""


_DOUBTS = (
    *("too_few_rows", "too_few_users", "mean_weight", "balance", "no_support"),
    *("weight_tail", "support", "hidden_support"),
)
"""Codes of the gate's reasons with which the estimate of a setting is not reliable."""


@dataclass(frozen=True)
class FrontierBounds:
    """What a recommended setting must satisfy.

    Attributes:
        min_effective_sample_size: rows of the log that agree with the policy, at least; None is the
            gate's own requirement, without which no verdict is possible.
        max_loss: largest loss of estimated value, as a share of the best setting's; within it, the
            setting that explores most is recommended. None recommends the best setting itself.
    """

    min_effective_sample_size: float | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        size, loss = self.min_effective_sample_size, self.max_loss
        if size is not None and not size > 0.0:
            raise ConfigError(f"the effective sample size to keep must be positive, got {size:g}")
        if loss is not None and not 0.0 <= loss < 1.0:
            raise ConfigError(f"the largest loss of value must lie in [0, 1), got {loss:g}")


@dataclass(frozen=True)
class FrontierPoint:
    """One way to serve the policy.

    Attributes:
        value, low, high: estimate and interval of all settings at once.
        effective_sample_size: of the importance weights on the log.
        pareto_k: tail of the weights; None without one.
        perplexity: number of equally likely items that explore as much.
        obstacle: why its estimate is not reliable; None where it is.
    """

    serving: ServingConfig
    value: float
    low: float
    high: float
    effective_sample_size: float
    pareto_k: float | None
    perplexity: float
    obstacle: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ServingFrontier:
    """All settings on one log.

    Attributes:
        points: the setting in force first, then the grid.
        recommended: None where no setting has a reliable estimate.
        reason: one sentence on the recommendation, or on why there is none.
        bounds: that it was chosen under.
        evaluation: the evaluation behind the points.
    """

    points: tuple[FrontierPoint, ...]
    recommended: FrontierPoint | None
    reason: str
    bounds: FrontierBounds
    evaluation: LogEvaluation

    def to_dict(self) -> dict[str, Any]:
        found = self.recommended
        return {
            "points": [point.to_dict() for point in self.points],
            "recommended": None if found is None else found.to_dict(),
            "reason": self.reason,
            "bounds": asdict(self.bounds),
            "notes": self.evaluation.notes,
            "log": self.evaluation.log,
            "rows": self.evaluation.result.n,
            "estimator": self.evaluation.result.decide_by,
            "confidence": self.evaluation.result.confidence,
        }


def serving_frontier(
    run: Path,
    *,
    log: AnyPath | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    uniform: Sequence[float] = UNIFORM,
    bounds: FrontierBounds | None = None,
    trust_code: Collection[str] = (),
    execution: Execution = LOCAL,
) -> ServingFrontier:
    """Evaluate a run's policy at every temperature and uniform share, and recommend one of them.

    Settings that share a temperature share the pass over the catalogue.

    Args:
        run: a finished run.
        log: logged rows; data.validation of the run, else data.test. Values on a log that the
            choice was made on are optimistic: evaluate the choice on another one.
        temperatures, uniform: the grid, beside what objective=auto proposed; other keys of serving
            stay as they are.
        bounds: of the recommendation.

    Raises:
        ConfigError: no log, a wrong grid, or too many settings. Others as `evaluate_runs`.
    """
    config = RunDirectory(run).load_config(trust_code=trust_code)
    place = log or config.data.validation or config.data.test
    if place is None:
        raise ConfigError(
            f"the configuration of '{run}' names neither data.validation nor data.test; pass the "
            "log to tune on with --log"
        )
    grid = _grid(config.serving, temperatures, uniform)
    proposed = proposed_serving(run)
    if proposed is not None and config.serving.mode == "sample":
        served = changed_serving(config.serving, proposed)
        if served not in (config.serving, *(changed_serving(config.serving, t) for t in grid)):
            grid.append(proposed)
    estimators = [{"name": "snips"}, {"name": "dr"}]
    evaluation = evaluate_runs(
        [run],
        log=place,
        overrides=[f"evaluation.estimators={estimators}", "evaluation.decide_by=auto"],
        trust_code=trust_code,
        also=grid,
        execution=execution,
    )
    facts = {"run": str(run), "policy": policy_digest(RunDirectory(run).policy)}
    record(place, evaluation.log["content"], "served", facts)
    bounds = bounds or FrontierBounds()
    if bounds.min_effective_sample_size is None:
        required = config.evaluation.gate.min_effective_sample_size
        bounds = replace(bounds, min_effective_sample_size=required)
    points = tuple(
        _point(evaluation, name, one, bounds) for name, one in evaluation.result.policies.items()
    )
    recommended, reason = recommend(points, bounds)
    if recommended is not None and recommended.serving.temperature == min(temperatures):
        reason += f"; no temperature below {min(temperatures):g} was tried"
    return ServingFrontier(points, recommended, reason, bounds, evaluation)


def apply_recommendation(
    run: Path, found: ServingFrontier, trust_code: Collection[str] = ()
) -> Config:
    """Serve the run as recommended, and keep on record which log that was chosen on.

    Raises:
        ConfigError: nothing is recommended. Others as `write_serving`.
    """
    if found.recommended is None:
        raise ConfigError(f"no way to serve '{run}' is recommended: {found.reason}")
    config = write_serving(run, found.recommended.serving, trust_code)
    directory = RunDirectory(run)
    before = directory.manifest().get("serving_tuned_on", [])
    logs = dict.fromkeys([*before, found.evaluation.log["content"]])
    directory.update_manifest({"serving_tuned_on": list(logs)})
    return config


def recommend(
    points: Sequence[FrontierPoint], bounds: FrontierBounds
) -> tuple[FrontierPoint | None, str]:
    """The recommended setting and the reason for it.

    Among settings with a reliable estimate: the highest lower bound of the value, whose intervals
    hold for all settings at once; with `max_loss`, the largest perplexity among those whose
    estimate is within that share of it.
    """
    reliable = [point for point in points if point.obstacle is None]
    if not reliable:
        largest = max(points, key=lambda point: point.effective_sample_size)
        return None, (
            "this log gives no reliable estimate of any setting, not even "
            f"{largest.serving.text}, which agrees with it most: {largest.obstacle}. Log more "
            "rows, serve what the log shows more often, or restrict the change to a share of the "
            "traffic and log that"
        )
    best = max(reliable, key=lambda point: point.low)
    if bounds.max_loss is None:
        return best, (
            f"{best.serving.text}: the highest lower bound of the value ({best.low:.4g}) among the "
            f"{len(reliable)} of {len(points)} settings with a reliable estimate"
        )
    least = best.value - bounds.max_loss * abs(best.value)
    kept = [point for point in reliable if point.value >= least]
    found = max(kept, key=lambda point: point.perplexity)
    return found, (
        f"{found.serving.text}: explores most (perplexity {found.perplexity:.4g}) among the "
        f"{len(kept)} settings whose value is within {bounds.max_loss:.0%} of the best "
        f"({best.value:.4g} with {best.serving.text})"
    )


def write_serving(run: Path, serving: ServingConfig, trust_code: Collection[str] = ()) -> Config:
    """Write the section serving of a run's stored configuration, and return the configuration.

    Raises:
        LeaseError: a process is writing to the run.
        RunError: the run cannot be read.
    """
    directory = RunDirectory(run)
    with Lease.acquire(directory.path) as lease:
        config = replace(directory.load_config(trust_code=trust_code), serving=serving)
        text = to_yaml(config)
        # A configuration that was edited by hand has no checksum, and stays so.
        if is_checked_text(directory.config_path.read_text(encoding="utf-8")):
            text = checked_text(text)
        lease.check()
        write_text(directory.config_path, text)
    return config


def proposed_serving(run: Path) -> str | None:
    """The settings that objective=auto proposed for this run, as `changed_serving` reads them."""
    report = RunDirectory(run).manifest().get("auto") or {}
    found = (report.get("serving") or {}).get("proposed")
    if found is None:
        return None
    return f"temperature={found['temperature']:g},uniform={found['uniform']:g}"


def _grid(
    serving: ServingConfig, temperatures: Sequence[float], uniform: Sequence[float]
) -> list[str]:
    """The settings beside the one in force, as `changed_serving` reads them."""
    if not temperatures or not uniform:
        raise ConfigError("a grid needs at least one temperature and one uniform share")
    texts: dict[str, None] = {}
    limited = serving.new_items is not None or (serving.top or serving.k) < serving.k
    for temperature, share in product(sorted(set(temperatures)), sorted(set(uniform))):
        if share == 0.0 and serving.top is not None and limited:
            continue  # `ServingConfig` refuses it: the best items cannot be drawn so.
        in_force = (serving.mode, serving.temperature, serving.uniform)
        if in_force != ("sample", temperature, share):
            mode = "" if serving.mode == "sample" else "mode=sample,"
            texts[f"{mode}temperature={temperature:g},uniform={share:g}"] = None
    if len(texts) > MAX_POINTS:
        raise ConfigError(f"the grid has {len(texts)} settings; at most {MAX_POINTS} are possible")
    return list(texts)


def _point(
    evaluation: LogEvaluation,
    name: str,
    found: PolicyEvaluation,
    bounds: FrontierBounds,
) -> FrontierPoint:
    result = evaluation.result
    estimate = found.estimates[result.decide_by]
    assert estimate.difference is not None and bounds.min_effective_sample_size is not None
    # For all settings at once: as much wider as the intervals of the differences are.
    gap = estimate.difference
    narrow = gap.interval.high - gap.interval.low
    wide = gap.simultaneous.high - gap.simultaneous.low
    factor = wide / narrow if narrow > 0.0 else 1.0
    value, weights, interval = estimate.estimate.value, found.weights, estimate.interval
    obstacle = None
    if weights.effective_sample_size < bounds.min_effective_sample_size:
        obstacle = (
            f"the effective sample size is {weights.effective_sample_size:,.1f}, and "
            f"{bounds.min_effective_sample_size:,.0f} are required"
        )
    else:
        obstacle = next((r.message for r in found.verdict.reasons if r.code in _DOUBTS), None)
    return FrontierPoint(
        serving=ServingConfig(**evaluation.serving[name]),
        value=value,
        low=value - factor * (value - interval.low),
        high=value + factor * (interval.high - value),
        effective_sample_size=weights.effective_sample_size,
        pareto_k=weights.pareto_k,
        perplexity=evaluation.coverage[name].perplexity,
        obstacle=obstacle,
    )
