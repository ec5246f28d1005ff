"""Weights of item clusters, for marginalized IPS (Saito and Joachims, ICML 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.columns import distinct_values
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError
from offtower.evaluation.scoring.policy import PolicyScorer, ScoredRows
from offtower.evaluation.scoring.propensities import LoggedProbability

MAX_CLUSTERS = 5000


def item_clusters(
    clusters: int | str, catalogue: Catalogue, scorer: PolicyScorer, seed: int
) -> NDArray[np.int64]:
    """(N,) cluster of each item, without gaps.

    clusters: a category feature of the catalogue, or a number of clusters for k-means over the
        policy's item embeddings.
    Raises ConfigError for an unknown feature, one that is no category, or more than 5,000 clusters.
    """
    if isinstance(clusters, str):
        specs = {spec.name: spec for spec in catalogue.schema.features}
        if clusters not in specs or specs[clusters].kind != "category":
            known = [name for name, spec in specs.items() if spec.kind == "category"]
            raise ConfigError(
                f"evaluation.clusters='{clusters}' is no category of the catalogue; it has "
                f"{', '.join(known) or 'none'} (or give a number of clusters)"
            )
        column = catalogue.table(0, catalogue.num_items).column(specs[clusters].source)
        _, found = distinct_values(column)
    else:
        if not 1 < clusters <= catalogue.num_items:
            raise ConfigError(
                f"evaluation.clusters={clusters} must lie in 2..{catalogue.num_items}, the items"
            )
        from sklearn.cluster import MiniBatchKMeans

        model = MiniBatchKMeans(clusters, random_state=seed % 2**32, n_init=1, batch_size=8192)
        found = model.fit_predict(scorer.items.embedding.double().numpy())
    label = np.unique(found, return_inverse=True)[1]
    if label.max() >= MAX_CLUSTERS:
        raise ConfigError(
            f"evaluation.clusters gives {label.max() + 1:,} clusters, at most {MAX_CLUSTERS:,}"
        )
    return label.astype(np.int64)


class ItemClusters:
    """Items by cluster. label: (N,) cluster of each item."""

    def __init__(self, label: NDArray[np.int64]) -> None:
        self.label = label
        order = np.argsort(label, kind="stable")
        self._members = np.split(order, np.cumsum(np.bincount(label))[:-1])

    @torch.no_grad()
    def log_probability(self, scored: ScoredRows, action: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n,) log pi(c|x) of the clusters of the logged items `action` (n,)."""
        items, out = scored.scorer.items, np.empty(action.size)
        logged = self.label[action]
        for cluster in np.unique(logged):
            rows = np.flatnonzero(logged == cluster)
            member = torch.from_numpy(self._members[cluster])
            log_mass = scored.scorer.served.log_mass(
                scored.context_embedding[rows],
                items,
                member,
                scored.log_normalizer[rows],
                eligible=scored.eligible_at(rows),
                position=None if scored.position is None else scored.position[rows],
            )
            out[rows] = log_mass.numpy()
        return out


@dataclass(frozen=True)
class ClusterWeights:
    """Weights of logged clusters: the policy's probability over an estimated logging one."""

    clusters: ItemClusters
    logging: LoggedProbability

    def of(self, scored: ScoredRows, rows: EncodedRows) -> NDArray[np.float64]:
        """(n,) of a batch."""
        target = np.exp(self.clusters.log_probability(scored, rows.action))
        return np.asarray(target / self.logging.of(rows))
