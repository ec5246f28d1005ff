"""One pass over the catalogue for the terms of several candidates on some rows.

The item towers embed a chunk at a time, once for all rows; logits are computed once for all
inverse temperatures, and the reward model once for all candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

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
from offtower.training.auto.held_out import CandidatePolicy, EvaluatedCandidates, HeldOutTerms
from offtower.training.auto.row_sampling import ItemSample
from offtower.training.auto.temperature_sums import TemperatureSums
from offtower.training.sampled import embed_some

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

    def by_policy(
        self, candidates: EvaluatedCandidates, pscore: Array
    ) -> Iterator[tuple[CandidatePolicy, HeldOutTerms]]:
        """Each policy with its terms, in the order of `candidates.policies`."""
        log_pscore = np.log(pscore)
        log_prob = np.concatenate([self.log_prob[name] for name in candidates.members])
        expected = np.concatenate([self.expected_reward[name] for name in candidates.members])
        for policy, one, value in zip(candidates.policies, log_prob, expected, strict=True):
            yield policy, HeldOutTerms(np.exp(one - log_pscore), value)


@dataclass(frozen=True)
class _Chunk:
    """Consecutive items of a catalogue, or the distinct items of candidate lists."""

    start: int
    items: Mapping[str, ItemEmbeddings]
    """Of the scores."""
    weight: Mapping[str, Tensor | None]
    """(n,) of each item in sums; None is 1."""
    size: int


class ItemPass:
    """Computes terms of rows over the whole catalogue.

    Args:
        items: the catalogue.
        device: of the members.
        chunk: items embedded at a time.
        sample: approximates sums over the catalogue, as if every item were eligible.
    """

    def __init__(
        self,
        items: ItemFeatures,
        device: torch.device,
        chunk: int,
        sample: ItemSample | None = None,
    ) -> None:
        self._items, self._device, self._sample = items, device, sample
        self._chunk = max(64, chunk - chunk % 64)

    @torch.no_grad()
    def terms(
        self,
        members: Mapping[str, TwoTowerPolicy],
        rows: EncodedRows,
        candidates: EvaluatedCandidates,
    ) -> PassTerms:
        """Compute the terms of one member per candidate."""
        if self._sample is not None:
            return self._terms(members, replace(rows, eligible=None), candidates)
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
        listed = masks.listed if self._sample is None else self._sample.item
        # The reward model comes first: the others use its predictions.
        order = sorted(members, key=lambda name: name != model)
        for chunk in self._chunks(members, listed, candidates):
            for first in range(0, chunk.size, PASS_ITEMS):
                last = min(first + PASS_ITEMS, chunk.size)
                mask = masks.ineligible(chunk.start + first, chunk.start + last)
                for begin in range(0, len(rows), PASS_ROWS):
                    block = slice(begin, min(begin + PASS_ROWS, len(rows)))
                    reward: Tensor | None = None
                    for name in order:
                        part, weight = chunk.items[name], chunk.weight[name]
                        bias = None if part.bias is None else part.bias[first:last]
                        logit = logits(
                            u[name][block], ItemEmbeddings(part.embedding[first:last], bias)
                        )
                        if name == model:
                            reward = torch.sigmoid(logit) if candidates.binary else logit.clone()
                        if mask is not None:
                            logit.masked_fill_(mask[block], float("-inf"))
                        sums[name].add(
                            *(block, logit, reward),
                            None if weight is None else weight[first:last],
                        )
        action = tensor_of(rows.action)
        action_logit: dict[str, Tensor] = {}
        log_prob: dict[str, Tensor] = {}
        for name, member in members.items():
            logged_items = embed_some(member, self._items, action)
            scores, base = without_base(logged_items, based=name in candidates.based)
            action_logit[name] = paired_logits(u[name], scores)
            found = sums[name].log_prob(action_logit[name])
            found = (found if base is None else found + base.double()).cpu()
            log_prob[name] = found if self._sample is None else self._sample.log_prob(found, action)
        zero = {n: np.zeros((len(one.inverse_temperatures), len(rows))) for n, one in sums.items()}
        expected = {name: one.expected_reward() for name, one in sums.items()}
        logged = np.zeros(len(rows))
        if model is not None:
            logit = action_logit[model].double()
            logged = (torch.sigmoid(logit) if candidates.binary else logit).cpu().numpy()
        return PassTerms(
            {name: one.numpy() for name, one in log_prob.items()},
            {name: zero[name] if m is None else m.cpu().numpy() for name, m in expected.items()},
            logged,
        )

    def _chunks(
        self,
        members: Mapping[str, TwoTowerPolicy],
        listed: Tensor | None,
        candidates: EvaluatedCandidates,
    ) -> Iterator[_Chunk]:
        if listed is not None:
            items = {n: embed_some(member, self._items, listed) for n, member in members.items()}
            yield self._chunk_of(0, items, len(listed), candidates)
            return
        for start in range(0, self._items.num_items, self._chunk):
            stop = min(start + self._chunk, self._items.num_items)
            numbered = self._items.numbered(start, stop)
            items = {n: ItemEmbeddings(*one.item_tower(*numbered)) for n, one in members.items()}
            yield self._chunk_of(start, items, stop - start, candidates)

    def _chunk_of(
        self,
        start: int,
        items: Mapping[str, ItemEmbeddings],
        size: int,
        candidates: EvaluatedCandidates,
    ) -> _Chunk:
        sampled = None if self._sample is None else self._sample.weight.to(self._device)
        scores: dict[str, ItemEmbeddings] = {}
        weight: dict[str, Tensor | None] = {}
        for name, one in items.items():
            scores[name], base = without_base(one, based=name in candidates.based)
            base = None if base is None else base.exp()
            weight[name] = base if sampled is None else sampled if base is None else sampled * base
        return _Chunk(start, scores, weight, size)


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


def without_base(items: ItemEmbeddings, *, based: bool) -> tuple[ItemEmbeddings, Tensor | None]:
    """The embeddings of scores, and the logarithm of the base measure where biases hold one."""
    return (ItemEmbeddings(items.embedding, None), items.bias) if based else (items, None)


def logits(context: Tensor, items: ItemEmbeddings) -> Tensor:
    """(b, n) scores without temperature."""
    product = context @ items.embedding.T
    return product if items.bias is None else product.add_(items.bias)


def paired_logits(context: Tensor, items: ItemEmbeddings) -> Tensor:
    """(b,) scores without temperature of one item per row."""
    product = (context * items.embedding).sum(dim=1)
    return product if items.bias is None else product + items.bias
