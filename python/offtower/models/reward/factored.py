"""Factored reward model: link(<e(x), t_a> + c_a), two towers, for catalogues of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from offtower.checksums import read_json, write_checked_json
from offtower.config import PolicyConfig, RewardModelConfig
from offtower.data.encoding import FeatureEncoding, to_tensors
from offtower.data.rows import EncodedRows
from offtower.errors import RunError
from offtower.models.features import FeatureTensors
from offtower.models.items import ItemEmbeddings, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.models.store import load_weights, save_weights
from offtower.ops import FactoredReward

Link = Literal["identity", "sigmoid"]


class FactoredRewardModel(RewardModel):
    """K pairs of towers, fitted on the complements of K folds.

    Args:
        towers: one `TwoTowerPolicy` per fold, whose logits are q's.
        items: features of the catalogue on the towers' device; each fold's item matrix is embedded
            once, at first use.
        link: sigmoid for binary rewards, else identity.
        chunk: items embedded at a time.
        factors: (K,) examination of each position of a slate relative to position 0; None for rows
            without positions.
    """

    def __init__(
        self,
        towers: list[TwoTowerPolicy],
        items: ItemFeatures,
        link: Link,
        chunk: int,
        factors: Tensor | None = None,
    ) -> None:
        self.factors = factors
        self.towers = towers
        self.link = link
        self.num_folds = len(towers)
        self._items = items
        self._chunk = chunk
        self._embedded: dict[int, ItemEmbeddings] = {}
        for model in towers:
            model.eval()
            model.requires_grad_(False)

    def with_items(self, items: ItemFeatures) -> FactoredRewardModel:
        """The same model over other items, such as a shard of the catalogue."""
        return FactoredRewardModel(self.towers, items, self.link, self._chunk, self.factors)

    def examination(self, rows: EncodedRows) -> Tensor | None:
        if self.factors is None or rows.position is None:
            return None
        position = torch.from_numpy(rows.position).clamp(max=len(self.factors) - 1)
        return self.factors[position.to(self.factors.device)]

    def for_training_rows(self, rows: EncodedRows, fold: int) -> FactoredReward:
        return self.for_features(to_tensors(rows.context, self._items.device), fold)

    def for_features(self, context: FeatureTensors, fold: int) -> FactoredReward:
        """Like `for_training_rows`, from context features as tensors."""
        with torch.no_grad():
            tower = self.towers[fold]
            embedding = tower.embed_contexts(context) / tower.temperature
            items = self._catalogue(fold)
        return FactoredReward(embedding, items.embedding, items.bias, link=self.link)

    def for_new_rows(self, rows: EncodedRows) -> FactoredReward:
        # The mean of K logits <e_k, t_k> + c_k is itself factored, of width K e.
        context = to_tensors(rows.context, self._items.device)
        with torch.no_grad():
            embedding = torch.cat(
                [t.embed_contexts(context) / t.temperature for t in self.towers], dim=1
            )
            items, bias = self._ensemble()
        return FactoredReward(embedding / self.num_folds, items, bias, link=self.link)

    def save(self, directory: Path) -> None:
        content: dict[str, object] = {"folds": self.num_folds, "link": self.link}
        if self.factors is not None:
            content["examination"] = self.factors.tolist()
        write_checked_json(directory / "factored.json", content)
        for fold, model in enumerate(self.towers):
            save_weights(directory / f"fold_{fold}.safetensors", model)

    @classmethod
    def restore(
        cls,
        directory: Path,
        config: RewardModelConfig,
        context_encoding: FeatureEncoding,
        item_encoding: FeatureEncoding,
        items: ItemFeatures,
        chunk: int,
    ) -> FactoredRewardModel:
        try:
            content = read_json(directory / "factored.json")
            folds, link = int(content["folds"]), content["link"]
            stored = content.get("examination")
            factors = None if stored is None else torch.tensor(stored, device=items.device)
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"reward model at '{directory}' cannot be read: {error}") from error
        towers = []
        for fold in range(folds):
            model = make_towers(config, context_encoding, item_encoding)
            load_weights(directory / f"fold_{fold}.safetensors", model)
            towers.append(model.to(items.device))
        return cls(towers, items, link, chunk, factors)

    def _catalogue(self, fold: int) -> ItemEmbeddings:
        if fold not in self._embedded:
            self._embedded[fold] = self.towers[fold].embed_items(self._items, chunk=self._chunk)
        return self._embedded[fold]

    def _ensemble(self) -> tuple[Tensor, Tensor]:
        parts = [self._catalogue(fold) for fold in range(self.num_folds)]
        if self.num_folds == 1:
            bias = parts[0].bias
            assert bias is not None
            return parts[0].embedding, bias
        key = -1
        if key not in self._embedded:
            biases = [part.bias for part in parts if part.bias is not None]
            self._embedded[key] = ItemEmbeddings(
                torch.cat([part.embedding for part in parts], dim=1),
                torch.stack(biases).mean(dim=0),
            )
        joined = self._embedded[key]
        assert joined.bias is not None
        return joined.embedding, joined.bias


def make_towers(
    config: RewardModelConfig,
    context_encoding: FeatureEncoding,
    item_encoding: FeatureEncoding,
) -> TwoTowerPolicy:
    """Build untrained towers with an item bias."""
    return TwoTowerPolicy(
        PolicyConfig(
            embedding_dim=config.embedding_dim,
            context_tower=config.tower,
            item_tower=config.tower,
            item_bias=True,
        ),
        context_encoding,
        item_encoding,
    )
