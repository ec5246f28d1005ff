"""Two-stage policies as two-tower policies: s(x, a) = kappa f(x, a) + <u'(x), e_c> + b_c.

f is the frozen mean logit of a reward model's towers, and c the item's cluster. With Z_c(x) the sum
of exp(kappa f) over a cluster, pi(c|x) is proportional to exp(<u', e_c> + b_c) Z_c(x), and
pi(a|x, c) is the softmax of kappa f within the cluster. Both sides are concatenated embeddings in
modules of ordinary towers, so the policy is stored, exported and searched like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from offtower.config import PolicyConfig, TowerConfig
from offtower.data.encoding import FeatureEncoding
from offtower.models.features import FeatureTensors
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.towers import Tower

_TOWER: TypeAdapter[TowerConfig] = TypeAdapter(TowerConfig)

_FROZEN, _CLUSTER = "\0frozen", "\0cluster"
"""Keys of `precomputed_items`, which no feature of a log can have."""


class TwoStageContexts(nn.Module):
    """Context side: the frozen reward towers, times kappa / K, and the trained tower u'.

    Args:
        output_dim: total width.
        base: configuration of each of the K = `folds` frozen towers, `base_dim` wide.
        head: configuration of u', which has the rest of the output.
        share: kappa / K.
    """

    def __init__(
        self,
        encoding: FeatureEncoding,
        output_dim: int,
        *,
        base: Mapping[str, Any],
        head: Mapping[str, Any],
        folds: int,
        base_dim: int,
        share: float,
    ) -> None:
        super().__init__()
        self.base = _frozen(encoding, base_dim, base, folds, bias=False)
        self.head = Tower(encoding, output_dim - folds * base_dim, _TOWER.validate_python(head))
        self.share = share

    def train(self, mode: bool = True) -> TwoStageContexts:
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, features: FeatureTensors) -> Tensor:
        return torch.cat([self.frozen(features), self.head(features)[0]], dim=1)

    @torch.no_grad()
    def frozen(self, features: FeatureTensors) -> Tensor:
        """(n, K base_dim) embeddings whose inner products with the item side are kappa f."""
        return self.share * torch.cat([tower(features)[0] for tower in self.base], dim=1)


class TwoStageItems(nn.Module):
    """Item side: the frozen reward towers and a row e_c, b_c for the item's cluster.

    An item's cluster is a function of its features: the value of a category (unknown values have
    row 0), or the nearest centroid. Rows start at zero, so training starts from the softmax of
    kappa f.

    Args:
        output_dim: total width with the bias.
        base, folds, base_dim, share: as of `TwoStageContexts`.
        clusters: the category, or the number of centroids.
        cluster_bias: whether b_c is learned.
    """

    def __init__(
        self,
        encoding: FeatureEncoding,
        output_dim: int,
        *,
        base: Mapping[str, Any],
        folds: int,
        base_dim: int,
        share: float,
        clusters: int | str,
        cluster_bias: bool,
    ) -> None:
        super().__init__()
        self.base = _frozen(encoding, base_dim, base, folds, bias=True)
        self.share = share
        self.feature = clusters if isinstance(clusters, str) else None
        rows = encoding.cardinality(clusters) if isinstance(clusters, str) else clusters
        options: Any = {"dtype": torch.float32, "device": "cpu"}
        self.table = nn.Embedding(rows, output_dim - 1 - folds * base_dim, **options)
        nn.init.zeros_(self.table.weight)
        self.bias = nn.Embedding(rows, 1, **options) if cluster_bias else None
        if self.bias is not None:
            nn.init.zeros_(self.bias.weight)
        if self.feature is None:
            self.register_buffer("centroids", torch.zeros(rows, folds * base_dim, **options))

    @property
    def num_clusters(self) -> int:
        return self.table.num_embeddings

    def train(self, mode: bool = True) -> TwoStageItems:
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, features: FeatureTensors) -> Tensor:
        frozen, cluster = self.frozen(features)
        embedding, bias = frozen[:, :-1], frozen[:, -1:]
        if self.bias is not None:
            bias = bias + self.bias(cluster)
        return torch.cat([embedding, self.table(cluster), bias], dim=1)

    @torch.no_grad()
    def frozen(self, features: FeatureTensors) -> tuple[Tensor, Tensor]:
        """(n, K base_dim + 1) embeddings and, last, biases of kappa f; (n,) clusters."""
        if _FROZEN in features:
            known, cluster = features[_FROZEN], features[_CLUSTER]
            assert isinstance(known, Tensor) and isinstance(cluster, Tensor)
            return known, cluster
        embeddings, biases = [], []
        for tower in _towers(self.base):
            embedding, bias = tower(features)
            assert bias is not None
            embeddings.append(embedding)
            biases.append(bias)
        embedding = torch.cat(embeddings, dim=1)
        bias = self.share * torch.stack(biases).sum(dim=0)
        frozen = torch.cat([embedding, bias.unsqueeze(1)], dim=1)
        return frozen, self._cluster(features, embedding)

    def _cluster(self, features: FeatureTensors, embedding: Tensor) -> Tensor:
        if self.feature is not None:
            value = features[self.feature]
            assert isinstance(value, Tensor)
            return value
        assert isinstance(self.centroids, Tensor)
        # The square of the item is the same for all centroids.
        square = self.centroids.square().sum(dim=1)
        return (square - 2.0 * (embedding @ self.centroids.T)).argmin(dim=1)


def two_stage_policy(
    config: PolicyConfig,
    towers: list[TwoTowerPolicy],
    clusters: int | str,
    inverse_temperature: float,
) -> TwoTowerPolicy:
    """Build an untrained policy over the logits of `towers`, which it copies and freezes.

    Args:
        config: embedding_dim and context_tower of u'; item_bias enables b_c.
        towers: one per fold, with item biases and without temperature.
        clusters: as for `TwoStageItems`; centroids are filled by the caller.
        inverse_temperature: kappa.
    """
    first = towers[0]
    base_dim, folds = first.config.embedding_dim, len(towers)
    common = {"folds": folds, "base_dim": base_dim, "share": inverse_temperature / folds}
    here = f"{__name__}:"
    policy = TwoTowerPolicy(
        replace(
            config,
            embedding_dim=folds * base_dim + config.embedding_dim,
            context_tower=TowerConfig(
                module=here + TwoStageContexts.__name__,
                arguments={
                    **common,
                    "base": _TOWER.dump_python(first.config.context_tower, mode="json"),
                    "head": _TOWER.dump_python(config.context_tower, mode="json"),
                },
            ),
            item_tower=TowerConfig(
                module=here + TwoStageItems.__name__,
                arguments={
                    **common,
                    "base": _TOWER.dump_python(first.config.item_tower, mode="json"),
                    "clusters": clusters,
                    "cluster_bias": config.item_bias,
                },
            ),
            item_bias=True,
        ),
        first.context_encoding,
        first.item_encoding,
    )
    contexts, items = bodies(policy)
    for k, model in enumerate(towers):
        contexts.base[k].load_state_dict(model.context_tower.state_dict())
        items.base[k].load_state_dict(model.item_tower.state_dict())
    # Random draws are keyed by row, and only the policy's own tower gets the row numbers.
    contexts.head.draw_with(policy.context_tower.draws)
    return policy


def bodies(policy: TwoTowerPolicy) -> tuple[TwoStageContexts, TwoStageItems]:
    """The two sides of a two-stage policy."""
    contexts, items = policy.context_tower.body, policy.item_tower.body
    assert isinstance(contexts, TwoStageContexts) and isinstance(items, TwoStageItems)
    return contexts, items


@torch.no_grad()
def precomputed_items(body: TwoStageItems, items: ItemFeatures, chunk: int) -> ItemFeatures:
    """Precompute the frozen part of every item; `body` reads it in place of the features.

    A training step then embeds the catalogue by table lookup.
    """
    n = items.num_items
    width = sum(tower.embedding_dim for tower in _towers(body.base)) + 1
    frozen, cluster = np.empty((n, width), np.float32), np.empty(n, np.int64)
    for start in range(0, n, chunk):
        part = slice(start, min(start + chunk, n))
        found = body.frozen(items.slice(part.start, part.stop))
        frozen[part], cluster[part] = (tensor.cpu().numpy() for tensor in found)
    return items.on_same_device(ItemFeatures({_FROZEN: frozen, _CLUSTER: cluster}, n))


def frozen_items(body: TwoStageItems, known: ItemFeatures) -> tuple[Tensor, Tensor]:
    """All of `precomputed_items`: (N, K base_dim + 1) and (N,)."""
    return body.frozen(known.slice(0, known.num_items))


def _frozen(
    encoding: FeatureEncoding, dim: int, config: Mapping[str, Any], folds: int, *, bias: bool
) -> nn.ModuleList:
    tower = _TOWER.validate_python(config)
    towers = nn.ModuleList(Tower(encoding, dim, tower, bias=bias) for _ in range(folds))
    return towers.requires_grad_(False).eval()


def _towers(base: nn.ModuleList) -> list[Tower]:
    return [tower for tower in base if isinstance(tower, Tower)]
