"""Members on the rows that they did not learn from, at several sharpnesses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from offtower.data.encoding import tensor_of, to_tensors
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows
from offtower.models.items import ItemEmbeddings
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import FactoredReward, policy_terms
from offtower.prepare import PreparedData
from offtower.training.auto.folds import Folds

SHARPNESS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Factors of a candidate's logits, in units of 1 / (their deviation between items)."""

SCAN_ROWS = 4096
_SCALE_ROWS = 256
_SCALE_ITEMS = 4096
_KEPT_ROWS = 20_000
"""Encoded rows that are kept between passes; more are read again."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """Held-out rows as estimators see them, in one order for all candidates and sharpnesses."""

    reward: Array
    """(n,)."""
    weight: Mapping[tuple[str, float], Array]
    """(n,) pi(a|x) / pscore, by candidate and factor of the logits."""
    expected: Mapping[tuple[str, float], Array]
    """(n,) sum_a pi(a|x) q(x, a); q is of the best regression candidate, and also held out."""
    action_reward: Array
    """(n,) q(x_i, a_i); zero without a regression candidate."""
    scale: Mapping[str, float]
    """Deviation of a candidate's logits between items: factor = sharpness / scale."""
    loss: Mapping[str, float]
    """Held-out loss of each regression candidate."""
    unit: NDArray[np.int64] | None
    """(n,) number, from 0 and without gaps, of the user or the context that rows hang together by;
    None where each row is by itself."""
    inverse_pscore: float = 0.0
    """Mean of 1 / pscore: N where the log may show every item. So heavy is a row, about, that
    shows what a sharp policy plays."""


@dataclass(frozen=True)
class _Side:
    members: list[TwoTowerPolicy]
    items: list[ItemEmbeddings]


class Judge:
    """Scores candidates' members out of fold.

    Args:
        data: the training log is read.
        folds: which fold each member was kept from.
        max_rows: a longer log is sampled by a keyed hash of the row.
        item_chunk: items embedded at a time.
    """

    def __init__(self, data: PreparedData, folds: Folds, max_rows: int, item_chunk: int) -> None:
        self._data = data
        self._folds = folds
        self._share = min(1.0, max_rows / (data.train.num_rows * self._held_share()))
        self._chunk = item_chunk
        self._kept: list[tuple[int, EncodedRows]] | None = None

    def __call__(
        self,
        candidates: Mapping[str, Sequence[TwoTowerPolicy]],
        regressions: Sequence[str],
        binary: bool,
    ) -> Judged:
        """Judge candidates; `regressions` names those whose logits predict the reward.

        Of these only the one with the least held-out loss is judged by value: on the same rows
        losses are far less noisy than values.
        """
        with torch.no_grad():
            sides = {
                name: _Side(
                    list(members),
                    [m.embed_items(self._data.items, chunk=self._chunk) for m in members],
                )
                for name, members in candidates.items()
            }
            loss = {name: self._loss(sides[name], binary) for name in regressions}
            best = min(loss, key=loss.__getitem__) if loss else None
            for name in regressions:
                if name != best:
                    del sides[name]
            scale = {name: self._scale(side) for name, side in sides.items()}
            return self._judge(sides, scale, loss, best, binary)

    def scale(self, members: Sequence[TwoTowerPolicy]) -> float:
        """Deviation of these members' logits between items, over all members' rows."""
        with torch.no_grad():
            items = [m.embed_items(self._data.items, chunk=self._chunk) for m in members]
            return self._scale(_Side(list(members), items))

    def _judge(
        self,
        sides: Mapping[str, _Side],
        scale: Mapping[str, float],
        loss: Mapping[str, float],
        best: str | None,
        binary: bool,
    ) -> Judged:
        keys = [(name, s / scale[name]) for name in sides for s in SHARPNESS]
        weight: dict[tuple[str, float], list[Array]] = {key: [] for key in keys}
        expected: dict[tuple[str, float], list[Array]] = {key: [] for key in keys}
        reward: list[Array] = []
        predicted: list[Array] = []
        units: list[NDArray[np.uint64]] = []
        inverse = 0.0
        for member, rows in self._rows():
            action = tensor_of(rows.action, self._data.device)
            context = to_tensors(rows.context, self._data.device)
            embedded = {
                n: side.members[member].embed_contexts(context) for n, side in sides.items()
            }
            q = None if best is None else _reward(embedded[best], sides[best].items[member], binary)
            assert rows.pscore is not None, "auto is for logs with propensities"
            log_pscore = tensor_of(rows.pscore, self._data.device).log()
            inverse += float(np.reciprocal(rows.pscore.astype(np.float64)).sum())
            reward.append(rows.reward.astype(np.float64))
            logged = np.zeros(len(rows))
            for name, factor in keys:
                items = sides[name].items[member]
                terms = policy_terms(
                    embedded[name],
                    items.embedding,
                    action,
                    temperature=1.0 / factor,
                    item_bias=None if items.bias is None else items.bias * factor,
                    reward_model=q,
                )
                log_weight = terms.log_prob.double() - log_pscore
                weight[name, factor].append(log_weight.exp().cpu().numpy())
                if terms.expected_reward is not None and terms.action_reward is not None:
                    expected[name, factor].append(_array(terms.expected_reward))
                    logged = _array(terms.action_reward)
                else:
                    expected[name, factor].append(np.zeros(len(rows)))
            predicted.append(logged)
            if not self._folds.by_row:
                units.append(self._folds.key(rows))
        rewards = np.concatenate(reward)
        return Judged(
            reward=rewards,
            weight={key: np.concatenate(parts) for key, parts in weight.items()},
            expected={key: np.concatenate(parts) for key, parts in expected.items()},
            action_reward=np.concatenate(predicted),
            scale=dict(scale),
            loss=dict(loss),
            unit=_numbered(np.concatenate(units)) if units else None,
            inverse_pscore=inverse / len(rewards),
        )

    def _scale(self, side: _Side) -> float:
        """Root mean square deviation of logits between items, over some rows of each member."""
        squares: list[Tensor] = []
        for member, rows in self._rows(_SCALE_ROWS):
            items = side.items[member]
            step = max(1, len(items.embedding) // _SCALE_ITEMS)
            context = to_tensors(rows.context, self._data.device)
            logit = side.members[member].embed_contexts(context)
            logit = logit @ items.embedding[::step].T
            if items.bias is not None:
                logit = logit + items.bias[::step]
            squares.append(logit.double().var(dim=1, correction=0))
        return max(float(torch.cat(squares).mean().sqrt()), 1e-6)

    def _loss(self, side: _Side, binary: bool) -> float:
        total = count = 0.0
        for member, rows in self._rows():
            logit = (
                side.members[member]
                .action_logit(
                    to_tensors(rows.context, self._data.device),
                    self._data.items.at(tensor_of(rows.action)),
                )
                .double()
            )
            reward = tensor_of(rows.reward, self._data.device).double()
            total += float(
                functional.binary_cross_entropy_with_logits(logit, reward, reduction="sum")
                if binary
                else torch.square(logit - reward).sum()
            )
            count += len(rows)
        return total / max(count, 1.0)

    def _rows(self, first: int | None = None) -> Iterator[tuple[int, EncodedRows]]:
        """(member, rows that it is judged on); `first` takes a few rows of each."""
        if self._kept is None and self._share * self._data.train.num_rows <= _KEPT_ROWS:
            self._kept = list(self._read(None))
        return iter(self._kept) if self._kept is not None else self._read(first)

    def _read(self, first: int | None) -> Iterator[tuple[int, EncodedRows]]:
        data, seen = self._data, [0] * len(self._folds.held_out)
        for rows in scan(
            data.train,
            data.catalogue,
            data.context_encoding,
            SCAN_ROWS,
            on_bad_rows=data.on_bad_rows,
            quarantine=data.quarantine_of("train"),
        ):
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

    def _held_share(self) -> float:
        return len(self._folds.held_out) / self._folds.number


def _numbered(keys: NDArray[np.uint64]) -> NDArray[np.int64] | None:
    distinct, number = np.unique(keys, return_inverse=True)
    return None if len(distinct) == len(keys) else number.astype(np.int64)


def _array(terms: Tensor) -> Array:
    return terms.double().cpu().numpy()


def _reward(context: Tensor, items: ItemEmbeddings, binary: bool) -> FactoredReward:
    return FactoredReward(
        context, items.embedding, items.bias, link="sigmoid" if binary else "identity"
    )
