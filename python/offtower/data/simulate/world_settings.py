"""Settings of a simulated world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from offtower.data.simulate.clicks import RewardKind
from offtower.data.simulate.drift import DriftSettings
from offtower.data.simulate.features import FeatureKinds
from offtower.data.simulate.histories import HistorySettings
from offtower.errors import ConfigError


@dataclass(frozen=True)
class WorldSettings:
    """Sizes, rewards and data of a simulated world.

    Attributes:
        dim_context: dimension of the context vector.
        dim_item: dimension of the item vector.
        latent_dim: rank of the interaction between contexts and items.
        reward: "binary" draws Bernoulli(q); "continuous" draws Beta(4q, 4(1-q)), mean q.
        scale: standard deviation of the interaction in z.
        popularity: standard deviation of the item's own part of z.
        intercept: z of an average item in an average context.
        n_users: different users; a user's contexts share half of their variance.
        feature_kinds: "vector" or "all" (see `features.py`).
        string_ids: item ids are strings.
        id_share: share of the variance of an item's factor and part of z that its features do not
            show, so that it can be learned for each id alone. Above 0 the id is a feature of the
            catalogue; at 1 it is the only one.
        drift: how rewards and the logging policy change over a log; None for none.
        history: histories of the contexts, on which rewards depend; None draws none. With them the
            items' ids are a feature too.

    Raises:
        ConfigError: a setting is out of its range.
    """

    dim_context: int = 8
    dim_item: int = 8
    latent_dim: int = 8
    reward: RewardKind = "binary"
    scale: float = 1.5
    popularity: float = 0.5
    intercept: float = -1.5
    n_users: int = 10_000
    feature_kinds: FeatureKinds = "vector"
    string_ids: bool = False
    id_share: float = 0.0
    drift: DriftSettings | None = None
    history: HistorySettings | None = None

    def __post_init__(self) -> None:
        for name in ("dim_context", "dim_item", "latent_dim", "n_users"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, but is {getattr(self, name)}")
        if not 0.0 <= self.id_share <= 1.0:
            raise ConfigError(f"id_share must lie in [0, 1], but is {self.id_share}")
        if self.reward not in get_args(RewardKind):
            raise ConfigError(f"reward must be 'binary' or 'continuous', but is {self.reward!r}")
        if self.feature_kinds not in get_args(FeatureKinds):
            raise ConfigError(
                f"feature_kinds must be 'vector' or 'all', but is {self.feature_kinds!r}"
            )
