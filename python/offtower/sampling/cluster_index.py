"""Approximate search by inner product in plain torch, for proposals.

FAISS is an optional dependency and training must not need it. Missed items add variance to the
sampled softmax, not bias.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

_ITERATIONS = 4
_SAMPLE_PER_CLUSTER = 64
_CELLS = 1 << 22


class ClusterIndex:
    """Inverted file: items in k-means clusters, of which a context probes the best.

    Args:
        embedding: (N, d) float32.
        bias: (N,) or None; appended as a coordinate, against 1 in the context.
        clusters: number of clusters; about sqrt(N) / 2 by default.
        probes: clusters searched per context.
        seed: seed of the k-means start.

    Source: Jegou, Douze and Schmid 2011, "Product quantization for nearest neighbor search".
    """

    def __init__(
        self,
        embedding: Tensor,
        bias: Tensor | None,
        *,
        seed: int,
        clusters: int | None = None,
        probes: int = 8,
    ) -> None:
        vectors = embedding.float()
        if bias is not None:
            vectors = torch.cat([vectors, bias.float()[:, None]], dim=1)
        n = len(vectors)
        clusters = min(clusters or max(1, round(n**0.5 / 2)), n)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(
            n, (min(n, clusters * _SAMPLE_PER_CLUSTER),), generator=generator, device="cpu"
        )
        self._centers = _k_means(vectors[chosen.to(vectors.device)], clusters)
        cluster = _nearest(vectors, self._centers)
        self._item = torch.argsort(cluster, stable=True)
        self._vectors = vectors[self._item]
        sizes = torch.bincount(cluster, minlength=clusters)
        self._ends = torch.cumsum(sizes, 0).tolist()
        self._biased = bias is not None
        self.probes = min(probes, clusters)

    def search(self, context_embedding: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return descending scores (B, k) and item numbers (B, k), padded with -inf and -1."""
        u = context_embedding.float()
        if self._biased:
            u = torch.cat([u, u.new_ones(len(u), 1)], dim=1)
        probed = torch.topk(u @ self._centers.T, self.probes, dim=1).indices
        # One matrix product per cluster, for all contexts that probe it.
        flat = probed.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.arange(len(self._centers) + 1, device=u.device)
        bounds = torch.searchsorted(flat[order], ends).tolist()
        score = u.new_full((len(flat), k), float("-inf"))
        row = flat.new_full((len(flat), k), -1)
        for cluster, (first, last) in enumerate(pairwise(bounds)):
            begin = self._ends[cluster - 1] if cluster else 0
            end = self._ends[cluster]
            if first == last or begin == end:
                continue
            slots = order[first:last]
            rows = torch.div(slots, self.probes, rounding_mode="floor")
            s = u[rows] @ self._vectors[begin:end].T
            best = torch.topk(s, min(k, end - begin), dim=1)
            width = best.values.shape[1]
            score[slots, :width] = best.values
            row[slots, :width] = best.indices + begin
        best = torch.topk(score.view(len(u), self.probes * k), k, dim=1)
        found = row.view(len(u), self.probes * k).gather(1, best.indices)
        return best.values, torch.where(found < 0, -1, self._item[found.clamp_min(0)])


def _k_means(sample: Tensor, clusters: int) -> Tensor:
    centers = sample[:clusters].clone()
    for _ in range(_ITERATIONS):
        cluster = _nearest(sample, centers)
        total = torch.zeros_like(centers).index_add_(0, cluster, sample)
        count = torch.bincount(cluster, minlength=clusters)
        # Empty clusters keep their center.
        centers = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], centers)
    return centers


def _nearest(vectors: Tensor, centers: Tensor) -> Tensor:
    half = centers.square().sum(dim=1) / 2
    step = max(1, _CELLS // len(centers))
    parts = [torch.addmm(-half, part, centers.T).argmax(dim=1) for part in vectors.split(step)]
    return torch.cat(parts)
