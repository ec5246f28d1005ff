"""Which estimators a log of slates permits, and under which interactions."""

from __future__ import annotations

from offtower.config import EstimatorConfig, EvaluationConfig
from offtower.data.log import Log, one_item_a_round
from offtower.data.schema import PscoreKind
from offtower.errors import ConfigError
from offtower.evaluation.estimators import ESTIMATORS
from offtower.evaluation.scoring.position_weights import PositionWeights
from offtower.evaluation.scoring.rewards import EvaluationModel

_LISTED = 20
"""Positions that a note lists."""
_PERMITTED = (
    ("conditional", "cascade"),
    ("conditional", "standard"),
    ("slate", "standard"),
    ("marginal", "independent"),
)
"""Interactions by pscore_kind."""


def slate_note(kind: PscoreKind) -> str:
    """For the reader of a report on slates."""
    if kind == "marginal":
        return (
            "the propensities are marginal, so each position has the policy's marginal probability "
            "(interaction 'independent'), and values are means over shown items. It assumes that a "
            "reward depends on the item at its position alone; 'cascade' and 'standard' need "
            "conditional propensities"
        )
    text = "values are means over rounds of the sum of rewards over their positions"
    if kind == "slate":
        return (
            f"{text}; the pscores of whole slates permit the interaction 'standard' only, whose "
            "weights are products over all positions"
        )
    return (
        f"{text}. The interaction 'cascade' assumes that a reward does not depend on later items; "
        "'standard' assumes nothing, at a larger variance. 'independent' is not offered: it needs "
        "marginal probabilities of each position, and is biased wherever a reward depends on the "
        "items above"
    )


def rounds_kind(log: Log) -> PscoreKind | None:
    """The pscore_kind of a log with rounds of several items; None for other logs.

    Reads the column of positions up to the first that is not 0.
    """
    schema = log.schema
    if schema.position is None or schema.round_id is None:
        return None
    return None if one_item_a_round(log) else schema.pscore_kind


def position_weights(options: EvaluationConfig, kind: PscoreKind | None) -> PositionWeights | None:
    """The configured weights of positions. kind: of the log of slates; None for other logs.

    Raises:
        ConfigError: the weights are wrong, or the log has no rounds of several items.
    """
    if options.position_weights is None:
        return None
    if kind is None:
        raise ConfigError(
            "evaluation.position_weights needs a log with rounds of several items: its schema "
            "names round_id, position and pscore_kind"
        )
    return PositionWeights(options.position_weights)


def examination_note(model: EvaluationModel | None) -> list[str]:
    """Say at which position the reward model is read, and how it falls along a slate."""
    factors = None if model is None else getattr(model.model, "factors", None)
    if factors is None:
        return []
    listed = ", ".join(f"{one:.3g}" for one in factors.tolist()[:_LISTED])
    more = ", ..." if len(factors) > _LISTED else ""
    return [
        "the reward model is of the reference position 0; its predictions are multiplied by the "
        f"examination of each position: {listed}{more}"
    ]


def has_form(one: EstimatorConfig, kind: PscoreKind | None) -> bool:
    """Whether an estimator has a form for slates with pscores of this kind; None is no slates."""
    if kind is None:
        return True
    if one.name in ("dm", "mips"):
        return False
    return kind == "conditional" or not ESTIMATORS[one.name].needs_reward_model


def check_interaction(one: EstimatorConfig, kind: PscoreKind | None) -> None:
    """Refuse an interaction that the log's pscores do not permit.

    Raises:
        ConfigError: it says which are permitted and why.
    """
    wanted = one.interaction
    if wanted == "auto" or (kind, wanted) in _PERMITTED:
        return
    if kind is None:
        raise ConfigError(
            f"the estimator {one.name} asks for the interaction '{wanted}', and the log has no "
            "rounds of several items: its schema needs round_id, position and pscore_kind"
        )
    permitted = " or ".join(f"'{way}'" for own, way in _PERMITTED if own == kind)
    reason = (
        "it needs each position's marginal probability, which a log of slates does not have"
        if wanted == "independent"
        else "it needs the conditional probability of each position"
    )
    raise ConfigError(
        f"the estimator {one.name} asks for the interaction '{wanted}', but pscore_kind '{kind}' "
        f"permits {permitted}: {reason}"
    )
