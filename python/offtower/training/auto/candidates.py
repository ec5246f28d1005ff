"""What `auto` tries: an objective and an architecture each, with their settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from offtower.config import AutoConfig, Config, PolicyConfig, TowerConfig
from offtower.data.encoding import FeatureEncoding
from offtower.errors import ConfigError
from offtower.objectives import Objective, Regression, make_objective
from offtower.prepare import PreparedData
from offtower.training.auto.belief import default_order
from offtower.training.checks import check_terms_for


@dataclass(frozen=True)
class Candidate:
    """A way to learn a policy from the log."""

    name: str
    objective: Objective
    policy: PolicyConfig
    learning_rate: float
    weight_decay: float

    @property
    def predicts_rewards(self) -> bool:
        return isinstance(self.objective, Regression)


@dataclass(frozen=True)
class Schedule:
    """How long each candidate learns."""

    epochs: int
    batch_size: int


_LINEAR_DIM = 64
_FEW_ITEMS = 1 << 15


def make_candidates(config: Config, data: PreparedData) -> list[Candidate]:
    """The candidates that the log allows.

    Raises:
        ConfigError: a name is unknown, or no candidate is left.
    """
    known: dict[str, Callable[[str], Candidate]] = {
        "regression_linear": lambda name: _linear(name, _regression(data), config, data),
        "regression": lambda name: _deep(name, _regression(data), config),
        "likelihood_linear": lambda name: _linear(name, _likelihood(), config, data),
        "likelihood": lambda name: _deep(name, _likelihood(), config),
        "implicit_linear": lambda name: _linear(
            name, _implicit(), config, data, widest=_implicit_width(data), weight_decay=1.0
        ),
    }
    names = config.auto.candidates or default_order(data)
    for name in names:
        if name not in known:
            raise ConfigError(f"auto.candidates: unknown '{name}'; known: {', '.join(known)}")
    negative = data.train.schema.reward_range[0] < 0.0
    made = [known[name](name) for name in names]
    made = [one for one in made if not (negative and one.objective.needs_nonnegative_reward)]
    if config.auto.candidates is None and config.training.terms == "sampled":
        made = [one for one in made if not one.objective.needs_square_sum]
    for one in made:
        # Members learn from the whole catalogue each, whatever the strategy.
        check_terms_for(one.objective, replace(config.training, strategy="replicated"))
    if not made:
        raise ConfigError(
            "auto.candidates: none is left that takes rewards below zero; add 'regression'"
        )
    return made


def make_schedule(settings: AutoConfig, rows: int) -> Schedule:
    """Passes over a log of `rows` rows: enough steps on small logs, few passes on large ones."""
    batch = settings.batch_size
    if batch is None:
        # Powers of two near a sixteenth of the log.
        batch = min(1024, max(64, 1 << max(0, (rows // 16).bit_length() - 1)))
    epochs = settings.epochs
    if epochs is None:
        steps = max(400, min(600, 30 * rows // batch))
        epochs = math.ceil(steps * batch / rows)
    return Schedule(epochs, min(batch, rows))


def _regression(data: PreparedData) -> Objective:
    return Regression().resolve(data.facts.binary_reward)


def _likelihood() -> Objective:
    return make_objective("weighted_likelihood", {"max_weight": 100.0})


def _implicit() -> Objective:
    return make_objective("implicit_squares", {"alpha": 0.1, "max_weight": 10.0})


def _implicit_width(data: PreparedData) -> int:
    """Rank costs an ensemble's embeddings memory, and some value is gained up to a full one."""
    return 256 if data.items.num_items <= _FEW_ITEMS else 128


def _linear(
    name: str,
    objective: Objective,
    config: Config,
    data: PreparedData,
    *,
    widest: int = _LINEAR_DIM,
    weight_decay: float = 0.1,
) -> Candidate:
    """Embeddings that are linear in the features: <u, v> has all interactions of context and item
    features, up to rank d. Ids and tokens need a wide one, few numbers do not."""
    given = config.policy.embedding_dim
    dim = max(given, min(widest, _width(data.context_encoding), _width(data.item_encoding)))

    def tower(given: TowerConfig) -> TowerConfig:
        return TowerConfig(
            category_embedding_dim=max(given.category_embedding_dim, dim),
            hidden_layer_sizes=(),
            tables="output",
            unknown_rate=given.unknown_rate,
        )

    policy = replace(_plain(config.policy, tower), embedding_dim=dim)
    return Candidate(name, objective, policy, learning_rate=1e-2, weight_decay=weight_decay)


def _width(encoding: FeatureEncoding) -> int:
    """Numbers that one row's features are, categories one-hot."""
    return sum(
        1
        if spec.kind == "numeric"
        else (spec.dim or 1)
        if spec.kind == "vector"
        else encoding.cardinality(spec.name)
        for spec in encoding.specs
    )


def _deep(name: str, objective: Objective, config: Config) -> Candidate:
    """The configured towers."""
    return Candidate(name, objective, _plain(config.policy), learning_rate=3e-3, weight_decay=0.1)


def _plain(
    policy: PolicyConfig, tower: Callable[[TowerConfig], TowerConfig] = lambda given: given
) -> PolicyConfig:
    """One member with an item bias and temperature 1: sharpness is chosen when all is learned."""

    def side(given: TowerConfig) -> TowerConfig:
        return replace(tower(given), members=1, bias_scale=1.0, bag="root")

    return replace(
        policy,
        context_tower=side(policy.context_tower),
        item_tower=side(policy.item_tower),
        temperature=1.0,
        learn_temperature=False,
        item_bias=True,
    )
