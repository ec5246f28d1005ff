"""Each row's most likely items under a recent policy, by search in periodically renewed embeddings
of the catalogue."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from offtower.models.items import DEFAULT_CHUNK, ItemFeatures, embed_items
from offtower.models.policy import TwoTowerPolicy
from offtower.models.towers import Tower
from offtower.ops import Eligibility, top_k
from offtower.sampling.cluster_index import ClusterIndex
from offtower.seeds import derive_seed

EXACT_SEARCH_ITEMS = 50_000
"""Catalogues up to this size are searched exactly."""


@dataclass(frozen=True)
class _Snapshot:
    """The item tower at one step, and the embeddings that are searched."""

    step: int
    tower: Tower
    temperature: float
    """The policy's temperature at that step, which scales the bias."""
    embedding: Tensor
    bias: Tensor | None
    index: ClusterIndex | None


class PolicyTopK:
    """Search the k items of largest probability for each context, by a recent item tower.

    At every `refresh_steps`-th step the item tower is copied, and another thread embeds the
    catalogue with the copy. The copy of the refresh before takes over at exactly that step, so
    results do not depend on the thread's speed. Staleness, up to twice `refresh_steps`, and misses
    of an approximate search add variance, not bias: the items found are counted exactly, and the
    others are covered by the draws.

    Args:
        policy: the policy in training.
        items: features of the catalogue.
        k: items per row; `wanted` keeps the number if the catalogue, or this part, has fewer.
        refresh_steps: steps between two embeddings of the catalogue.
        seed: seed of the index.
        chunk: items embedded at a time.
    """

    def __init__(
        self,
        policy: TwoTowerPolicy,
        items: ItemFeatures,
        *,
        k: int,
        refresh_steps: int,
        seed: int,
        chunk: int = DEFAULT_CHUNK,
    ) -> None:
        self._policy, self._items = policy, items
        self.wanted = k
        self.k = min(k, items.num_items)
        self.refresh_steps = refresh_steps
        self._seed, self._chunk = seed, chunk
        self._current: _Snapshot | None = None
        self._pending: Future[_Snapshot] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="offtower-top-k")

    def due(self, step: int) -> bool:
        """Whether `at_step` does anything at this step."""
        return self._current is None or step % self.refresh_steps == 0

    def at_step(self, step: int) -> None:
        """Refresh if due; called before each step with the number of steps taken so far."""
        if not self.due(step):
            return
        if self._pending is not None:
            self._current = self._pending.result()
        tower = copy.deepcopy(self._policy.item_tower)
        self._pending = self._start(step, tower, self._policy.temperature)
        if self._current is None:
            self._current = self._pending.result()
            self._pending = None

    def search(
        self, context_embedding: Tensor, eligible: Eligibility | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return descending scores (B, k) and item numbers (B, k), padded with -inf and -1.

        An approximate search may find fewer than k eligible items; those that it misses are left
        to the draws.
        """
        snapshot = self._current
        assert snapshot is not None, "at_step comes before the first draw"
        if snapshot.index is not None:
            found = snapshot.index.search(context_embedding, self.k)
            return found if eligible is None else _eligible_first(*found, eligible)
        u = context_embedding.to(snapshot.embedding.dtype)
        if eligible is None:
            return top_k(u, snapshot.embedding, self.k, item_bias=snapshot.bias)
        # In a part of the catalogue a row may have no eligible item.
        some = eligible.count(self._items.num_items).nonzero()[:, 0]
        score = u.new_full((len(u), self.k), float("-inf"), dtype=torch.float32)
        item = torch.full_like(score, -1, dtype=torch.int64)
        if len(some):
            found = top_k(
                *(u[some], snapshot.embedding, self.k),
                item_bias=snapshot.bias,
                eligible=eligible.take(some),
            )
            score[some], item[some] = found[0].to(score.dtype), found[1]
        return score, item

    def state(self) -> dict[str, Tensor]:
        """State for a checkpoint, so that a resumed run finds the same items."""
        pending = None if self._pending is None else self._pending.result()
        tensors: dict[str, Tensor] = {}
        for name, snapshot in (("current", self._current), ("pending", pending)):
            if snapshot is not None:
                tensors[f"{name}/step"] = torch.tensor(snapshot.step, device="cpu")
                tensors[f"{name}/temperature"] = torch.tensor(
                    snapshot.temperature, dtype=torch.float64, device="cpu"
                )
                for key, value in snapshot.tower.state_dict().items():
                    tensors[f"{name}/tower/{key}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state of a checkpoint."""
        self._current, self._pending = None, None
        for name in ("current", "pending"):
            if f"{name}/step" not in tensors:
                continue
            tower = copy.deepcopy(self._policy.item_tower)
            prefix = f"{name}/tower/"
            tower.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
            # Accept checkpoints written before temperature schedules existed.
            known = tensors.get(f"{name}/temperature")
            temperature = self._policy.temperature if known is None else float(known)
            built = self._start(int(tensors[f"{name}/step"]), tower, temperature)
            if name == "current":
                self._current = built.result()
            else:
                self._pending = built

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self, step: int, tower: Tower, temperature: float) -> Future[_Snapshot]:
        tower.eval()
        tower.requires_grad_(False)
        return self._thread.submit(self._build, step, tower, temperature)

    def _build(self, step: int, tower: Tower, temperature: float) -> _Snapshot:
        with torch.no_grad():
            items = embed_items(tower, self._items, chunk=self._chunk)
            # <u, v> + temperature b ranks items as <u, v> / temperature + b does.
            bias = items.bias
            if bias is not None and temperature != 1.0:
                bias = bias * temperature
            if self._items.num_items <= EXACT_SEARCH_ITEMS:
                return _Snapshot(step, tower, temperature, items.embedding, bias, None)
            index = ClusterIndex(
                items.embedding, bias, seed=derive_seed(self._seed, "top-k index", step)
            )
        # The index holds its own copy of the vectors.
        return _Snapshot(step, tower, temperature, items.embedding[:0], None, index)


def _eligible_first(score: Tensor, item: Tensor, eligible: Eligibility) -> tuple[Tensor, Tensor]:
    """Scores and items (B, k) without those that are not eligible, which are padded at the end."""
    rows, k = item.shape
    row = torch.arange(rows, dtype=torch.int64, device=item.device).repeat_interleave(k)
    there = eligible.contains(row, item.clamp_min(0).reshape(-1)).view(rows, k) & (item >= 0)
    order = torch.argsort(~there, dim=1, stable=True)
    score = score.masked_fill(~there, float("-inf")).gather(1, order)
    return score, item.masked_fill(~there, -1).gather(1, order)
