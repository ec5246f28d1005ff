"""One pass over the catalogue for the terms of several candidates on some rows.

The item towers embed a chunk at a time, once for all rows; logits are computed once for all
inverse temperatures, and the reward model once for all candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower.data.encoding import tensor_of, to_tensors
from offtower.data.rows import EncodedRows
from offtower.models.items import ItemEmbeddings, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import Eligibility
from offtower.ops.eligibility import ItemMask
from offtower.training.auto.temperature_sums import TemperatureSums
from offtower.training.sampled import embed_some

if TYPE_CHECKING:
    from offtower.training.auto.held_out import EvaluatedCandidates

PASS_ROWS, PASS_ITEMS = 128, 2048
"""Of a block of logits, 1 MiB, which a core's cache holds. `ItemMask` needs a multiple of 64."""
_LISTED_ROWS = 128
"""Rows with candidate lists that are evaluated together, on the items of their lists."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PassTerms:
    """Terms of n rows."""

    log_prob: Mapping[str, Array]
    """(T, n) of each candidate at each inverse temperature."""
    expected_reward: Mapping[str, Array]
    """(T, n); zero without a reward model."""
    action_reward: Array
    """(n,) q(x_i, a_i); zero without a reward model."""


@dataclass(frozen=True)
class _Chunk:
    """Consecutive items of a catalogue, or the distinct items of candidate lists."""

    start: int
    items: Mapping[str, ItemEmbeddings]
    size: int


class ItemPass:
    """Computes terms of rows over the whole catalogue.

    Args:
        items: the catalogue.
        device: of the members.
        chunk: items embedded at a time.
    """

    def __init__(self, items: ItemFeatures, device: torch.device, chunk: int) -> None:
        self._items, self._device = items, device
        self._chunk = max(64, chunk - chunk % 64)

    @torch.no_grad()
    def terms(
        self,
        members: Mapping[str, TwoTowerPolicy],
        rows: EncodedRows,
        candidates: EvaluatedCandidates,
    ) -> PassTerms:
        """Compute the terms of one member per candidate."""
        if rows.eligible is None or rows.eligible.candidates is None:
            return self._terms(members, rows, candidates)
        starts = range(0, len(rows), _LISTED_ROWS)
        parts = [
            self._terms(
                members,
                rows.take(np.arange(start, min(start + _LISTED_ROWS, len(rows)))),
                candidates,
            )
            for start in starts
        ]
        return PassTerms(
            {n: np.concatenate([p.log_prob[n] for p in parts], axis=1) for n in members},
            {n: np.concatenate([p.expected_reward[n] for p in parts], axis=1) for n in members},
            np.concatenate([p.action_reward for p in parts]),
        )

    def _terms(
        self,
        members: Mapping[str, TwoTowerPolicy],
        rows: EncodedRows,
        candidates: EvaluatedCandidates,
    ) -> PassTerms:
        context = to_tensors(rows.context, self._device)
        u = {name: member.embed_contexts(context) for name, member in members.items()}
        model = candidates.reward_model
        sums = {
            name: TemperatureSums(
                len(rows),
                candidates.inverse_temperatures(name),
                self._device,
                rewards=model is not None,
            )
            for name in members
        }
        eligible = None if rows.eligible is None else rows.eligible.on(self._device)
        masks = _Masks(eligible, len(rows))
        # The reward model comes first: the others use its predictions.
        order = sorted(members, key=lambda name: name != model)
        for chunk in self._chunks(members, masks.listed):
            for first in range(0, chunk.size, PASS_ITEMS):
                last = min(first + PASS_ITEMS, chunk.size)
                mask = masks.ineligible(chunk.start + first, chunk.start + last)
                for begin in range(0, len(rows), PASS_ROWS):
                    block = slice(begin, min(begin + PASS_ROWS, len(rows)))
                    reward: Tensor | None = None
                    for name in order:
                        part = chunk.items[name]
                        bias = None if part.bias is None else part.bias[first:last]
                        logit = logits(
                            u[name][block], ItemEmbeddings(part.embedding[first:last], bias)
                        )
                        if name == model:
                            reward = torch.sigmoid(logit) if candidates.binary else logit.clone()
                        if mask is not None:
                            logit.masked_fill_(mask[block], float("-inf"))
                        sums[name].add(block, logit, reward)
        action = tensor_of(rows.action)
        action_logit = {
            name: paired_logits(u[name], embed_some(member, self._items, action))
            for name, member in members.items()
        }
        zero = np.zeros((len(next(iter(sums.values())).inverse_temperatures), len(rows)))
        expected = {name: one.expected_reward() for name, one in sums.items()}
        logged = np.zeros(len(rows))
        if model is not None:
            logit = action_logit[model].double()
            logged = (torch.sigmoid(logit) if candidates.binary else logit).cpu().numpy()
        return PassTerms(
            {name: one.log_prob(action_logit[name]).cpu().numpy() for name, one in sums.items()},
            {name: zero if m is None else m.cpu().numpy() for name, m in expected.items()},
            logged,
        )

    def _chunks(
        self, members: Mapping[str, TwoTowerPolicy], listed: Tensor | None
    ) -> Iterator[_Chunk]:
        if listed is not None:
            items = {n: embed_some(member, self._items, listed) for n, member in members.items()}
            yield _Chunk(0, items, len(listed))
            return
        for start in range(0, self._items.num_items, self._chunk):
            stop = min(start + self._chunk, self._items.num_items)
            numbered = self._items.numbered(start, stop)
            items = {n: ItemEmbeddings(*one.item_tower(*numbered)) for n, one in members.items()}
            yield _Chunk(start, items, stop - start)


class _Masks:
    """Which items each of B rows may not choose, by chunks of items."""

    def __init__(self, eligible: Eligibility | None, rows: int) -> None:
        self._rows = rows
        self.listed: Tensor | None = None
        """The distinct items of candidate lists, on the CPU; they are then the items."""
        self._lists: Tensor | None = None
        self._mask: ItemMask | None = None
        if eligible is None:
            return
        resolved = eligible.resolved()
        if resolved.candidates is None:
            self._mask = ItemMask(resolved)
            return
        item, lists = resolved.candidates.compact()
        self.listed = item.cpu()
        self._lists = torch.ones(rows, len(item), dtype=torch.bool, device=item.device)
        self._lists[lists.entry_rows(), lists.items] = False

    def ineligible(self, start: int, stop: int) -> Tensor | None:
        """(B, stop - start) bool; None where every item is eligible."""
        if self._lists is not None:
            return self._lists[:, start:stop]
        return None if self._mask is None else self._mask.ineligible(start, stop, self._rows)


def logits(context: Tensor, items: ItemEmbeddings) -> Tensor:
    """(b, n) scores without temperature."""
    product = context @ items.embedding.T
    return product if items.bias is None else product.add_(items.bias)


def paired_logits(context: Tensor, items: ItemEmbeddings) -> Tensor:
    """(b,) scores without temperature of one item per row."""
    product = (context * items.embedding).sum(dim=1)
    return product if items.bias is None else product + items.bias
