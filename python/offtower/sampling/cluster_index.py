"""Approximate search by inner product in plain torch, for proposals: whatever it misses costs
variance and no bias."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

_ITERATIONS = 4
_SAMPLE_PER_CLUSTER = 64
_CELLS = 1 << 22


class ClusterIndex:
    """Items in clusters; a context looks into those whose centres fit it best.

    Args:
        embedding: (N, d) float32.
        bias: (N,) or None; one more coordinate, against 1 in the context.
        clusters: about sqrt(N) / 2 where None.
        probes: clusters that a context looks into.
        seed: of the k-means start; the same seed gives the same index.

    Source: the inverted file of Jegou, Douze and Schmid 2011, "Product quantization for nearest
    neighbor search".
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
        self._centres = _k_means(vectors[chosen.to(vectors.device)], clusters)
        cluster = _nearest(vectors, self._centres)
        self._item = torch.argsort(cluster, stable=True)
        self._vectors = vectors[self._item]
        sizes = torch.bincount(cluster, minlength=clusters)
        self._ends = torch.cumsum(sizes, 0).tolist()
        self._biased = bias is not None
        self.probes = min(probes, clusters)

    def search(self, context_embedding: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(B, k) falling scores and item numbers; -inf and -1 where fewer were found."""
        u = context_embedding.float()
        if self._biased:
            u = torch.cat([u, u.new_ones(len(u), 1)], dim=1)
        probed = torch.topk(u @ self._centres.T, self.probes, dim=1).indices
        # Contexts of one cluster are scored together: one matrix product a cluster.
        flat = probed.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.arange(len(self._centres) + 1, device=u.device)
        bounds = torch.searchsorted(flat[order], ends).tolist()
        score = u.new_full((len(flat), k), float("-inf"))
        place = flat.new_full((len(flat), k), -1)
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
            place[slots, :width] = best.indices + begin
        best = torch.topk(score.view(len(u), self.probes * k), k, dim=1)
        found = place.view(len(u), self.probes * k).gather(1, best.indices)
        return best.values, torch.where(found < 0, -1, self._item[found.clamp_min(0)])


def _k_means(sample: Tensor, clusters: int) -> Tensor:
    centres = sample[:clusters].clone()
    for _ in range(_ITERATIONS):
        cluster = _nearest(sample, centres)
        total = torch.zeros_like(centres).index_add_(0, cluster, sample)
        count = torch.bincount(cluster, minlength=clusters)
        # An empty cluster keeps its centre.
        centres = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], centres)
    return centres


def _nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    half = centres.square().sum(dim=1) / 2
    step = max(1, _CELLS // len(centres))
    parts = [torch.addmm(-half, part, centres.T).argmax(dim=1) for part in vectors.split(step)]
    return torch.cat(parts)
