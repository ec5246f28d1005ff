"""Candidates of `auto`: an objective, an architecture and optimizer settings each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from offtower.config import AutoConfig, Config, PolicyConfig, TowerConfig
from offtower.data.encoding import FeatureEncoding
from offtower.errors import ConfigError
from offtower.objectives import (
    BehaviorCloning,
    ImplicitSquares,
    Objective,
    Regression,
    WeightedLikelihood,
)
from offtower.prepare import PreparedData
from offtower.training.auto.mixed_policy import MAX_CONTEXT_WIDTH, MIXED, context_width
from offtower.training.auto.prior_order import CLONE, ids_only, prior_order
from offtower.training.auto.rewarded_rows import RewardedRows
from offtower.training.checks import check_eligible, check_terms


@dataclass(frozen=True)
class PolicyCandidate:
    """A way to learn a policy from the log."""

    name: str
    objective: Objective
    policy: PolicyConfig
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    solved: bool = False
    """Whether its weights are solved for on rows in memory (`mixed_model`), not trained."""

    @property
    def predicts_rewards(self) -> bool:
        return isinstance(self.objective, Regression)


@dataclass(frozen=True)
class Schedule:
    """How long each candidate learns."""

    epochs: int
    batch_size: int
    steps: int | None = None
    """Batches after which training ends; None reads all epochs."""


_LINEAR_DIM, _LINEAR_DIM_MANY_ITEMS = 256, 128
"""Value rises with the rank up to a full one, and so does the memory of the embeddings."""
_MANY_ITEMS = 1 << 15
EXACT_FACTOR = 4
"""Catalogues of more than this many times `sampling.num_samples` items use sampled terms, and begin
with the mixed model."""
_MAX_WEIGHT = 100.0
_EFFECTIVE_OF_ITEM, _EFFECTIVE = 0.75, 0.5
"""Shares of rewarded rows that the largest weight 1 / pscore leaves effective."""
_ALPHA = 0.04
"""Weight of all items in implicit squares, over the mean weight of rewarded rows."""


def make_candidates(config: Config, data: PreparedData) -> list[PolicyCandidate]:
    """Build the candidates that the log allows, in prior order.

    Raises:
        ConfigError: a name is unknown, or no candidate is left.
    """
    rewarded = RewardedRows.of(data)
    ids = ids_only(data)
    most = (
        rewarded.max_weight(_EFFECTIVE_OF_ITEM, per_item=True)
        if ids
        # Features share rows between items, so all weights together decide.
        else max(_MAX_WEIGHT, rewarded.max_weight(_EFFECTIVE, per_item=False))
    )
    regression = Regression().for_rewards(binary=data.facts.binary_reward)
    likelihood = WeightedLikelihood(max_weight=most)
    implicit = ImplicitSquares(_ALPHA * rewarded.mean_weight(most), max_weight=most)
    many = data.items.num_items > _MANY_ITEMS
    linear = _linear(config, data, _LINEAR_DIM_MANY_ITEMS if many else _LINEAR_DIM)
    deep = _plain(config.policy)
    large = data.items.num_items > EXACT_FACTOR * config.sampling.num_samples
    # Estimated normalizers would bias the weights.
    exact = config.training.terms == "exact" and not large
    cloning = BehaviorCloning(known_propensities=exact)
    known = {
        one.name: one
        for one in (
            PolicyCandidate("regression_linear", regression, linear),
            PolicyCandidate("regression", regression, deep, learning_rate=3e-3),
            PolicyCandidate("likelihood_linear", likelihood, linear),
            PolicyCandidate("likelihood", likelihood, deep, learning_rate=3e-3),
            PolicyCandidate("implicit_linear", implicit, linear, weight_decay=1.0),
            PolicyCandidate(CLONE, cloning, deep, learning_rate=3e-3),
        )
    }
    width = context_width(data)
    if width is not None:
        mixed = replace(linear, embedding_dim=width)
        known[MIXED] = PolicyCandidate(MIXED, regression, mixed, solved=True)
    names = config.auto.candidates or prior_order(data, rewarded)
    if config.auto.candidates is None and large and MIXED in known:
        # The mixed model solves for what other linear towers would train, so that their time and
        # their terms over the catalogue go into evidence. Likelihoods of rarely rewarded ids, by
        # sampled terms, ended below .1 of its value.
        likelihood_names = () if ids else ("likelihood",)
        names = (MIXED, "regression", *likelihood_names, CLONE)
    for name in names:
        if name not in known:
            if name == MIXED:
                raise ConfigError(
                    f"auto.candidates: '{name}' needs contexts of numbers, vectors and categories "
                    f"of at most {MAX_CONTEXT_WIDTH - 1} values in all, and items without bags"
                )
            raise ConfigError(f"auto.candidates: unknown '{name}'; known: {', '.join(known)}")
    negative = data.train.schema.reward_range[0] < 0.0
    no_square_sums = config.auto.candidates is None and (
        config.training.terms == "sampled" or data.train.schema.eligible is not None
    )
    made = []
    for one in (known[name] for name in names):
        needs = one.objective.requirements
        if (negative and needs.nonnegative_reward) or (no_square_sums and needs.square_sum):
            continue
        # Members read the whole catalogue under every strategy.
        check_terms(one.objective, replace(config.training, strategy="replicated"))
        check_eligible(one.objective, data)
        made.append(one)
    if not made:
        raise ConfigError(
            "auto.candidates: none is left that takes rewards below zero; add 'regression'"
        )
    return made


def make_schedule(settings: AutoConfig, rows: int) -> Schedule:
    """Choose enough steps for small logs and few epochs for large ones."""
    batch = settings.batch_size
    if batch is None:
        # Powers of two near a sixteenth of the log.
        batch = min(1024, max(64, 1 << max(0, (rows // 16).bit_length() - 1)))
    epochs = settings.epochs
    if epochs is None:
        steps = max(400, min(600, 30 * rows // batch))
        # A batch has rows of one fold.
        epochs = math.ceil(steps * min(batch, math.ceil(rows / settings.folds)) / rows)
    return Schedule(epochs, min(batch, rows))


def _linear(config: Config, data: PreparedData, max_dim: int) -> PolicyConfig:
    """Embeddings that are linear in the features: <u, v> has all interactions of context and item
    features up to rank d. Ids and tokens need a high rank, a few numeric features do not."""
    width = min(_width(data.context_encoding), _width(data.item_encoding))
    dim = max(config.policy.embedding_dim, min(max_dim, width))

    def tower(given: TowerConfig) -> TowerConfig:
        return TowerConfig(
            category_embedding_dim=max(given.category_embedding_dim, dim),
            hidden_layer_sizes=(),
            tables="output",
            history=given.history,
            unknown_rate=given.unknown_rate,
        )

    return replace(_plain(config.policy, tower), embedding_dim=dim)


def _width(encoding: FeatureEncoding) -> int:
    """Width of a row's features with categories one-hot."""
    return sum(
        1
        if spec.kind == "numeric"
        else (spec.dim or 1)
        if spec.kind == "vector"
        else encoding.cardinality(spec.name)
        for spec in encoding.specs
    )


def _plain(
    policy: PolicyConfig, tower: Callable[[TowerConfig], TowerConfig] = lambda given: given
) -> PolicyConfig:
    """A single member with an item bias and temperature 1, which is chosen after fitting."""

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
