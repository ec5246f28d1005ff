"""Weights and expected rewards of candidates on the rows that their members did not see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from offtower.data.encoding import tensor_of, to_tensors
from offtower.data.rows import EncodedRows
from offtower.models.items import ItemEmbeddings
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import FactoredReward, policy_terms
from offtower.prepare import PreparedData
from offtower.training.auto.folds import Folds

INVERSE_TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""In units of 1 / (standard deviation of a candidate's logits between items)."""

SCAN_ROWS = 4096
_SCALE_ROWS = 256
_SCALE_ITEMS = 4096
_KEPT_ROWS = 20_000
"""Encoded rows that are kept between passes; more are read again."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CandidatePolicy:
    """A candidate's policy at one inverse temperature."""

    name: str
    inverse_temperature: float


@dataclass(frozen=True)
class HeldOutTerms:
    """Terms of one policy on the held-out rows."""

    weight: Array
    """(n,) pi(a|x) / pscore."""
    expected_reward: Array
    """(n,) sum_a pi(a|x) q(x, a); zero without a reward model."""


@dataclass(frozen=True)
class HeldOutRows:
    """Held-out rows in one order for all policies.

    q is the held-out prediction of the best regression candidate.
    """

    reward: Array
    """(n,)."""
    terms: Mapping[CandidatePolicy, HeldOutTerms]
    """Each candidate's policies in ascending inverse temperature."""
    action_reward: Array
    """(n,) q(x_i, a_i); zero without a regression candidate."""
    scale: Mapping[str, float]
    """Standard deviation of each candidate's logits between items."""
    loss: Mapping[str, float]
    """Held-out loss of each regression candidate."""
    unit: NDArray[np.int64] | None
    """(n,) number, from 0 and without gaps, of the user or context by which rows are correlated;
    None where all rows are independent."""
    pscore: Array
    """(n,) logged propensity."""
    eligible_items: Array
    """(n,) number of items that could have been shown."""

    @property
    def inverse_pscore(self) -> float:
        """Mean of 1 / pscore (N where all items may be shown): about the weight of a row that shows
        the item of a sharp policy."""
        return float(np.reciprocal(self.pscore).mean())

    def policies(self, name: str) -> list[CandidatePolicy]:
        """One candidate's policies in ascending inverse temperature."""
        return [policy for policy in self.terms if policy.name == name]


@dataclass(frozen=True)
class _Members:
    policies: list[TwoTowerPolicy]
    items: list[ItemEmbeddings]


class HeldOutEvaluator:
    """Evaluates candidates' members out of fold.

    Args:
        data: its training log is read.
        folds: the fold that each member did not see.
        max_rows: a longer log is sampled by a keyed hash of the row.
        item_chunk: items embedded at a time.
    """

    def __init__(self, data: PreparedData, folds: Folds, max_rows: int, item_chunk: int) -> None:
        self._data = data
        self._folds = folds
        held_out = data.train.num_rows * (len(folds.held_out) / folds.number)
        self._share = min(1.0, max_rows / held_out)
        self._chunk = item_chunk
        self._kept: list[tuple[int, EncodedRows]] | None = None

    @torch.no_grad()
    def evaluate(
        self,
        candidates: Mapping[str, Sequence[TwoTowerPolicy]],
        regressions: Sequence[str],
        *,
        binary: bool,
    ) -> HeldOutRows:
        """Compute the terms of all candidates, except regressions with a higher held-out loss.

        On the same rows losses are far less noisy than values, so regressions compete by loss.

        Args:
            regressions: names of the candidates whose logits predict the reward.
            binary: whether all rewards are 0 or 1.
        """
        members = {name: self._embedded(policies) for name, policies in candidates.items()}
        loss = {name: self._loss(members[name], binary=binary) for name in regressions}
        best = min(loss, key=loss.__getitem__) if loss else None
        for name in regressions:
            if name != best:
                del members[name]
        return self._terms(members, loss, best, binary=binary)

    @torch.no_grad()
    def scale(self, policies: Sequence[TwoTowerPolicy]) -> float:
        """Standard deviation of these members' logits between items, over all members' rows."""
        return self._scale(self._embedded(policies))

    def _embedded(self, policies: Sequence[TwoTowerPolicy]) -> _Members:
        items = [one.embed_items(self._data.items, chunk=self._chunk) for one in policies]
        return _Members(list(policies), items)

    def _terms(
        self,
        members: Mapping[str, _Members],
        loss: Mapping[str, float],
        best: str | None,
        *,
        binary: bool,
    ) -> HeldOutRows:
        scale = {name: self._scale(side) for name, side in members.items()}
        policies = [
            CandidatePolicy(name, s / scale[name]) for name in members for s in INVERSE_TEMPERATURES
        ]
        weight: dict[CandidatePolicy, list[Array]] = {policy: [] for policy in policies}
        expected: dict[CandidatePolicy, list[Array]] = {policy: [] for policy in policies}
        reward: list[Array] = []
        predicted: list[Array] = []
        units: list[NDArray[np.uint64]] = []
        pscore: list[Array] = []
        eligible_items: list[Array] = []
        number = self._data.items.num_items
        for k, rows in self._rows():
            action = tensor_of(rows.action, self._data.device)
            context = to_tensors(rows.context, self._data.device)
            embedded = {n: side.policies[k].embed_contexts(context) for n, side in members.items()}
            q = None if best is None else _reward(embedded[best], members[best].items[k], binary)
            assert rows.pscore is not None, "auto requires propensities"
            eligible = None if rows.eligible is None else rows.eligible.on(self._data.device)
            log_pscore = tensor_of(rows.pscore, self._data.device).log()
            pscore.append(rows.pscore.astype(np.float64))
            eligible_items.append(
                np.full(len(rows), float(number))
                if eligible is None
                else _array(eligible.count(number))
            )
            reward.append(rows.reward.astype(np.float64))
            logged = np.zeros(len(rows))
            for policy in policies:
                items = members[policy.name].items[k]
                terms = policy_terms(
                    embedded[policy.name],
                    items.embedding,
                    action,
                    temperature=1.0 / policy.inverse_temperature,
                    item_bias=None
                    if items.bias is None
                    else items.bias * policy.inverse_temperature,
                    reward_model=q,
                    eligible=eligible,
                )
                log_weight = terms.log_prob.double() - log_pscore
                weight[policy].append(log_weight.exp().cpu().numpy())
                if terms.expected_reward is not None and terms.action_reward is not None:
                    expected[policy].append(_array(terms.expected_reward))
                    logged = _array(terms.action_reward)
                else:
                    expected[policy].append(np.zeros(len(rows)))
            predicted.append(logged)
            if not self._folds.by_row:
                units.append(self._folds.key(rows))
        return HeldOutRows(
            reward=np.concatenate(reward),
            terms={
                policy: HeldOutTerms(
                    np.concatenate(weight[policy]), np.concatenate(expected[policy])
                )
                for policy in policies
            },
            action_reward=np.concatenate(predicted),
            scale=scale,
            loss=dict(loss),
            unit=_numbered(np.concatenate(units)) if units else None,
            pscore=np.concatenate(pscore),
            eligible_items=np.concatenate(eligible_items),
        )

    def _scale(self, members: _Members) -> float:
        """Root mean square deviation of logits between items, over some rows of each member."""
        squares: list[Tensor] = []
        for k, rows in self._rows(_SCALE_ROWS):
            items = members.items[k]
            step = max(1, len(items.embedding) // _SCALE_ITEMS)
            context = to_tensors(rows.context, self._data.device)
            logit = members.policies[k].embed_contexts(context) @ items.embedding[::step].T
            if items.bias is not None:
                logit = logit + items.bias[::step]
            squares.append(logit.double().var(dim=1, correction=0))
        return max(float(torch.cat(squares).mean().sqrt()), 1e-6)

    def _loss(self, members: _Members, *, binary: bool) -> float:
        total = count = 0.0
        for k, rows in self._rows():
            context = to_tensors(rows.context, self._data.device)
            item = self._data.items.at(tensor_of(rows.action))
            logit = members.policies[k].action_logit(context, item).double()
            reward = tensor_of(rows.reward, self._data.device).double()
            total += float(
                functional.binary_cross_entropy_with_logits(logit, reward, reduction="sum")
                if binary
                else torch.square(logit - reward).sum()
            )
            count += len(rows)
        return total / max(count, 1.0)

    def _rows(self, first: int | None = None) -> Iterator[tuple[int, EncodedRows]]:
        """(member, rows that it did not see); `first` limits the rows of each member."""
        if self._kept is None and self._share * self._data.train.num_rows <= _KEPT_ROWS:
            self._kept = list(self._read(None))
        return iter(self._kept) if self._kept is not None else self._read(first)

    def _read(self, first: int | None) -> Iterator[tuple[int, EncodedRows]]:
        seen = [0] * len(self._folds.held_out)
        for rows in self._data.scan(SCAN_ROWS):
            fold, kept = self._folds.of(rows), self._folds.sampled(rows, self._share)
            for member, held_out in enumerate(self._folds.held_out):
                index = np.flatnonzero((fold == held_out) & kept)
                if first is not None:
                    index = index[: first - seen[member]]
                if len(index):
                    seen[member] += len(index)
                    yield member, rows.take(index)
            if first is not None and min(seen) >= first:
                return


def _numbered(keys: NDArray[np.uint64]) -> NDArray[np.int64] | None:
    distinct, number = np.unique(keys, return_inverse=True)
    return None if len(distinct) == len(keys) else number.astype(np.int64)


def _array(terms: Tensor) -> Array:
    return terms.double().cpu().numpy()


def _reward(context: Tensor, items: ItemEmbeddings, binary: bool) -> FactoredReward:
    return FactoredReward(
        context, items.embedding, items.bias, link="sigmoid" if binary else "identity"
    )
