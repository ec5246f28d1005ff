"""Feature encoders, towers, the two-tower policy, reward models."""

from offtower.models.items import ItemEmbeddings, ItemFeatures, embed_items
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_policy, save_policy
from offtower.models.towers import Tower

__all__ = [
    "ItemEmbeddings",
    "ItemFeatures",
    "Tower",
    "TwoTowerPolicy",
    "embed_items",
    "load_policy",
    "save_policy",
]
