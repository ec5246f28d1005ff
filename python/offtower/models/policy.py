"""The two-tower softmax policy pi(a|x) proportional to exp(<u(x), v_a> / temperature + b_a)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from offtower.config import PolicyConfig
from offtower.data.encoding import FeatureEncoding
from offtower.models.features import FeatureTensors, Tables
from offtower.models.histories import ItemTable
from offtower.models.items import DEFAULT_CHUNK, ItemEmbeddings, ItemFeatures, embed_items
from offtower.models.towers import MLPBody, Tower, tower_of_features
from offtower.ops import DenseReward, Eligibility, FactoredReward, PolicyTerms, policy_terms
from offtower.seeds import derive_seed


class TwoTowerPolicy(nn.Module):
    """Context tower, item tower, temperature.

    Args:
        config: sizes, temperature, item bias.
        context_encoding: fitted encoding of the context features.
        item_encoding: fitted encoding of the item features.
        item_table_rows: rows of some of the item tower's tables, for a shard of the catalogue.
    """

    def __init__(
        self,
        config: PolicyConfig,
        context_encoding: FeatureEncoding,
        item_encoding: FeatureEncoding,
        *,
        item_table_rows: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        config = replace(
            config,
            context_tower=tower_of_features(config.context_tower, context_encoding),
            item_tower=tower_of_features(config.item_tower, item_encoding),
            temperature=config.softmax_temperature(),
        )
        self.config = config
        """With the layers of both towers and a temperature."""
        self.context_encoding = context_encoding
        self.item_encoding = item_encoding
        self.context_tower, self.item_tower = _towers(
            config, context_encoding, item_encoding, Tables(item_table_rows or {})
        )
        log_temperature = torch.tensor(
            math.log(config.softmax_temperature()), dtype=torch.float32, device="cpu"
        )
        if config.learn_temperature:
            self.log_temperature: Tensor = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)
        self.training_temperature: float | None = None
        """Overrides the configured temperature in training mode; None does not."""

    @property
    def device(self) -> torch.device:
        """Device of the weights; features must be there too."""
        return self.log_temperature.device

    @property
    def temperature(self) -> float:
        """The temperature for the operators; a learned one is folded into u, and this is 1."""
        if self.config.learn_temperature:
            return 1.0
        if self.training and self.training_temperature is not None:
            return self.training_temperature
        return self.config.softmax_temperature()

    def train_in(self, dtype: torch.dtype) -> None:
        """Compute training passes of both towers in `dtype`, float32 or bfloat16.

        Weights, and passes in evaluation mode, stay float32.
        """
        self.context_tower.training_dtype = self.item_tower.training_dtype = dtype

    def seed_draws(self, seed: int) -> None:
        """Derive the towers' random draws from `seed` and row numbers (see `models.row_draws`)."""
        self.context_tower.draws.seed = derive_seed(seed, "context draws")
        self.item_tower.draws.seed = derive_seed(seed, "item draws")

    def embed_contexts(self, features: FeatureTensors, numbers: Tensor | None = None) -> Tensor:
        """(n, d) embeddings u; with a learned temperature they are u / temperature.

        Args:
            numbers: (n,) of the rows in their batch, which key their random draws.
        """
        embedding: Tensor = self.context_tower(features, numbers)[0]
        if self.config.learn_temperature:
            embedding = embedding * torch.exp(-self.log_temperature)
        return embedding

    def embed_items(self, features: ItemFeatures, *, chunk: int = DEFAULT_CHUNK) -> ItemEmbeddings:
        """(N, d) embeddings v and (N,) biases; differentiable in bounded memory."""
        return embed_items(self.item_tower, features, chunk=chunk)

    def terms(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        action: Tensor,
        *,
        reward_model: DenseReward | FactoredReward | None = None,
        entropy: bool = False,
        eligible: Eligibility | None = None,
    ) -> PolicyTerms:
        """Fused per-row terms of the policy (see `offtower.ops.policy_terms`)."""
        return policy_terms(
            context_embedding,
            items.embedding,
            action,
            temperature=self.temperature,
            item_bias=items.bias,
            reward_model=reward_model,
            entropy=entropy,
            eligible=eligible,
        )

    def action_logit(
        self, context: FeatureTensors, item: FeatureTensors, numbers: Tensor | None = None
    ) -> Tensor:
        """(n,) <u_i, v_i> + b_i of paired rows, without temperature: the regression prediction.

        Args:
            numbers: (n,) of the rows in their batch, for the random draws of both towers.
        """
        context_embedding = _summable(self.context_tower(context, numbers)[0])
        item_embedding, item_bias = self.item_tower(item, numbers)
        logit = (context_embedding * _summable(item_embedding)).sum(dim=1)
        return logit if item_bias is None else logit + _summable(item_bias)


def _towers(
    config: PolicyConfig,
    context_encoding: FeatureEncoding,
    item_encoding: FeatureEncoding,
    tables: Tables,
) -> tuple[Tower, Tower]:
    """The towers of contexts and of items; histories read the item tower's table of ids.

    Args:
        tables: of the item tower.
    """

    def of_items() -> Tower:
        return Tower(
            item_encoding,
            config.embedding_dim,
            config.item_tower,
            bias=config.item_bias,
            tables=[tables] * config.item_tower.members,
        )

    def of_contexts(shared: Sequence[Tables]) -> Tower:
        return Tower(context_encoding, config.embedding_dim, config.context_tower, tables=shared)

    if config.context_tower.module is not None or config.context_tower.history.items == "own":
        return of_contexts(()), of_items()
    shared = {
        spec.name: feature.name
        for spec in context_encoding.specs
        for feature in item_encoding.specs
        if spec.history
        and feature.kind == "category"
        and context_encoding.same_values(spec.name, item_encoding, feature.name)
    }
    if not shared:
        # The context tower first: the order of the random draws decides the initial weights.
        return of_contexts(()), of_items()
    items = of_items()
    return of_contexts(_item_tables(items, shared, config.context_tower.members)), items


def _item_tables(items: Tower, shared: Mapping[str, str], members: int) -> list[Tables]:
    """Tables of each member of the context tower: those of the same member of the item tower.

    Args:
        shared: the item feature, by history.
    """
    bodies = items.bodies
    if len(bodies) != members or not all(isinstance(body, MLPBody) for body in bodies):
        return []
    found: list[Tables] = []
    for body in bodies:
        assert isinstance(body, MLPBody)
        found.append(
            Tables(
                items={
                    name: ItemTable(body.encoder.embedding(feature))
                    for name, feature in shared.items()
                }
            )
        )
    return found


def _summable(embedding: Tensor) -> Tensor:
    """Cast bfloat16 to float32 for sums."""
    return embedding.float() if embedding.dtype == torch.bfloat16 else embedding
