"""Evaluate policies that offtower did not train, by the same estimators, intervals and gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from offtower.atomic import sha256_file
from offtower.config import Config, EvaluationConfig, ServingConfig, parse_config
from offtower.config.serving import changed_serving
from offtower.data.catalogue import Catalogue
from offtower.data.ledger import LogLedger
from offtower.data.location import AnyPath, Location
from offtower.data.log import ParquetLog
from offtower.errors import ConfigError, DataError
from offtower.evaluation.baselines import Baselines
from offtower.evaluation.behavior.loggers import Loggers
from offtower.evaluation.behavior.plan import BehaviorPlan
from offtower.evaluation.estimators import ESTIMATORS
from offtower.evaluation.evaluator import EvaluationPlan, Evaluator
from offtower.evaluation.looks import CountedLook, LookRequest, evaluation_identity, identity
from offtower.evaluation.options import (
    evaluation_options,
    make_estimators,
    needs_pilot,
    usable_estimators,
)
from offtower.evaluation.run import LogEvaluation, evaluate_plan
from offtower.evaluation.run_loading import with_overrides
from offtower.evaluation.scoring.batches import BatchScorer, LogSource
from offtower.evaluation.scoring.clock import LogClock, check_times
from offtower.evaluation.scoring.external import (
    COLUMNS_MODEL,
    ColumnScorer,
    EmbeddingScorer,
    PolicyColumns,
    columns_encoding,
)
from offtower.evaluation.scoring.rewards import RewardModels
from offtower.evaluation.selection_data import check_selection
from offtower.evaluation.slate_options import position_weights, slate_note
from offtower.execution import LOCAL, Execution

Scorers = Mapping[str, ColumnScorer | EmbeddingScorer]

_NO_BEHAVIOR = "the policy that made the log is read from runs, and none is evaluated"


def evaluate_columns(
    log: AnyPath,
    catalogue: AnyPath,
    columns: Sequence[PolicyColumns],
    *,
    overrides: Sequence[str] = (),
    fresh: str | None = None,
    select: str | None = None,
    execution: Execution = LOCAL,
) -> LogEvaluation:
    """Evaluate policies whose probabilities of the logged items are columns of the log.

    DM, DR and their relatives are left out unless a policy's columns include predictions. The
    columns are read in float32.

    Args:
        log: directory of an ingested log; its schema names the columns under `keep`.
        columns: of each policy; the policy has the name of its column of probabilities.
        overrides, fresh, select, execution: as in `offtower.evaluation.run.evaluate_runs`.

    Raises:
        ConfigError: no column, one that is named twice, or a wrong option.
        DataError: the log has no propensities or lacks a column, or a probability is none.
    """
    if not columns or len({one.probability for one in columns}) < len(columns):
        raise ConfigError("name some columns of probabilities, each once")
    opened, place = _open(log)
    encoding = columns_encoding(list(columns))
    missing = [spec.source for spec in encoding.specs if spec.source not in opened.schema.columns]
    if missing:
        raise DataError(
            f"the log at '{place}' has no column '{missing[0]}': name it under 'keep' in the "
            "section 'log' of the schema, and ingest the log again"
        )
    opened = ParquetLog.open(place, replace(opened.schema, context=encoding.specs))
    scorers = {one.probability: ColumnScorer(one, encoding) for one in columns}
    modeled = [one.action_reward is not None for one in columns]
    if any(modeled) and not all(modeled):
        raise ConfigError(
            "give predictions (--policy-column PROBABILITY,Q,EXPECTED) for every policy or for none"
        )
    config = _config(place, catalogue, overrides)
    main = COLUMNS_MODEL if all(modeled) else None
    identities = {one.probability: identity(asdict(one)) for one in columns}
    scored = _Scored(opened, config, scorers, identities, fresh, main)
    return _evaluate(scored, select, execution)


def evaluate_embeddings(
    log: AnyPath,
    catalogue: AnyPath,
    contexts: Path,
    items: Path,
    *,
    also: Sequence[str] = (),
    overrides: Sequence[str] = (),
    fresh: str | None = None,
    select: str | None = None,
    execution: Execution = LOCAL,
) -> LogEvaluation:
    """Evaluate the softmax policy, or another served policy, of another trainer's two towers.

    The scores are inner products; multiply one side to change the temperature, and append a
    constant 1 to it for item biases.

    Args:
        log, catalogue: directories that `offtower ingest` wrote.
        contexts: .npy file of (rows of the log, d) floats, in the order of the log.
        items: .npy file of (items of the catalogue, d) floats, in the order of the catalogue.
        also: further ways to serve the policy, as in `evaluate_runs`.
        overrides, fresh, select, execution: as in `evaluate_runs`.

    Raises:
        ConfigError: a wrong option.
        DataError: the log has no propensities, or the arrays do not fit.
    """
    opened, place = _open(log)
    config = _config(place, catalogue, overrides)
    opened = ParquetLog.open(place, replace(opened.schema, context=()))
    found = Catalogue.open(config.data.catalogue, log_schema=opened.schema)
    name = contexts.stem if contexts.stem != items.stem else contexts.parent.name
    base = EmbeddingScorer(contexts, items, opened.num_rows, found.num_items, ServingConfig())
    scorers = {name: base}
    for text in also:
        serving = changed_serving(base.serving, text)
        scorers[f"{name} {text}"] = base.served_as(serving)
    towers = [sha256_file(file) for file in (contexts, items)]
    identities = {key: identity(towers, asdict(scorer.serving)) for key, scorer in scorers.items()}
    return _evaluate(_Scored(opened, config, scorers, identities, fresh), select, execution)


def _open(log: AnyPath) -> tuple[ParquetLog, Location]:
    place = Location.of(log)
    opened = ParquetLog.open(place)
    if opened.schema.pscore is None:
        raise DataError(
            f"the log at '{place}' has no propensities: off-policy evaluation needs the column "
            "'pscore' in its schema"
        )
    return opened, place


def _config(place: Location, catalogue: AnyPath, overrides: Sequence[str]) -> Config:
    """Defaults. No training log is read; the evaluated one stands in its place."""
    data = {"train": str(place), "test": str(place), "catalogue": str(catalogue)}
    config = parse_config({"name": "external", "data": data}, source="evaluate")
    return with_overrides(config, overrides)


@dataclass(frozen=True)
class _Scored:
    """Policies by name, the log that they are evaluated on, and the configuration.

    identities: by policy, what tells it apart from others.
    fresh: as in `offtower.evaluation.run.evaluate_runs`.
    reward_model: name of the model whose predictions the scorers give; None without.
    """

    log: ParquetLog
    config: Config
    scorers: Scorers
    identities: Mapping[str, str]
    fresh: str | None
    reward_model: str | None = None


def _evaluate(policies: _Scored, select: str | None, execution: Execution) -> LogEvaluation:
    log, config, reward_model = policies.log, policies.config, policies.reward_model
    options = config.evaluation
    check_selection(select, log, options.selection)
    check_times(options.time, has_times=log.schema.timestamp is not None)
    catalogue = Catalogue.open(config.data.catalogue, log_schema=log.schema)
    kind = log.schema.pscore_kind if log.schema.slates else None
    if reward_model is None:
        options = _without_models(options)
    chosen, notes = usable_estimators(
        options, has_reward_model=reward_model is not None, pscore_kind=kind
    )
    if needs_pilot(chosen):
        raise ConfigError(
            "parameters by SLOPE are chosen for runs only; give numbers in evaluation.estimators"
        )
    if kind is not None:
        notes.append(slate_note(kind))
    alpha, reward_range = position_weights(options, kind), log.schema.reward_range
    if alpha is not None:
        notes.append(alpha.note)
        reward_range = alpha.range(reward_range)
    source = LogSource(log, catalogue, options.batch_rows)
    loggers = Loggers.open(source, config, chosen)
    estimators, _ = make_estimators(chosen, {}, loggers)
    plan = EvaluationPlan(
        BatchScorer(
            source,
            policies.scorers,
            RewardModels((), reward_model, False, False, options.draws),
            None,
            None,
            config.seed,
            alpha,
            loggers,
            LogClock.of(log),
        ),
        BehaviorPlan(None, None, None, None, _NO_BEHAVIOR, log.num_rows),
        evaluation_options(
            options, estimators, reward_range, config.seed, propensities_estimated=False
        ),
        Baselines(catalogue.num_items),
        select,
        tuple(notes),
    )
    evaluator = Evaluator((), log, catalogue, config)
    how = evaluation_identity(plan.options, options, log, catalogue)
    keys = {name: identity(policies.identities[name], how) for name in policies.scorers}
    place, known = str(config.data.test), log.content
    request = LookRequest(known.fingerprint, keys, options.confidence, {}, policies.fresh, known)
    look = CountedLook(LogLedger(place), request)
    return evaluate_plan(evaluator, plan, place, execution, look)


def _without_models(options: EvaluationConfig) -> EvaluationConfig:
    """The options with those estimators that need no reward model."""
    weighted = tuple(
        one
        for one in options.estimators
        if one.name not in ESTIMATORS or not ESTIMATORS[one.name].needs_reward_model
    )
    if not weighted:
        raise ConfigError(
            "every estimator of evaluation.estimators needs a reward model, whose predictions only "
            "--policy-column PROBABILITY,Q,EXPECTED gives; add snips"
        )
    return replace(options, estimators=weighted)


def parse_columns(text: str) -> PolicyColumns:
    """Parse 'PROBABILITY' or 'PROBABILITY,Q,EXPECTED'. Raises ConfigError for anything else."""
    names = [name.strip() for name in text.split(",")]
    if len(names) not in (1, 3) or not all(names):
        raise ConfigError(
            f"--policy-column '{text}' must be the name of a column of probabilities, or "
            "PROBABILITY,Q,EXPECTED with those of a reward model's predictions"
        )
    return PolicyColumns(*names)
