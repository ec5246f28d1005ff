"""Compute weights and expected rewards of candidates on the rows that their members did not see."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from offtower.data.encoding import tensor_of, to_tensors
from offtower.data.rows import EncodedRows
from offtower.errors import RunError
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.seeds import derive_seed
from offtower.training.auto.folds import Folds
from offtower.training.auto.held_out import (
    CLONE_SCALE,
    CandidatePolicy,
    EvaluatedCandidates,
    HeldOutRows,
    HeldOutTerms,
    numbered_units,
)
from offtower.training.auto.item_pass import (
    ItemPass,
    PassTerms,
    logits,
    paired_logits,
    without_base,
)
from offtower.training.auto.prior_order import CLONE
from offtower.training.auto.row_sampling import (
    ItemSample,
    RowOrder,
    row_sizes,
    squared_contribution,
)
from offtower.training.sampled import embed_some

SCAN_ROWS = 4096
_SCALE_ROWS = 256
_SCALE_ITEMS = 4096
_PASS_ROWS = 1024
"""Rows of a member that share a pass over the catalogue, at least."""
_FIRST_PASS_ROWS = 16_384
"""Of the first phase, at most."""
_KEPT_ROWS = 20_000
"""Encoded rows that are kept between passes; more are read again. Those of a first phase are always
kept."""
FIRST_PHASE = 0.2
"""Time of a first phase, in units of that of the second."""
MIN_SAMPLE, _MAX_SAMPLE = 256, 4096
"""Items of the first phase's normalizers."""

Array = NDArray[np.float64]


class HeldOutEvaluator:
    """Evaluates candidates' members out of fold.

    Args:
        data: its training log is read.
        folds: the fold that each member did not see.
        max_rows: a longer log is sampled by a keyed hash of the row.
        item_chunk: items embedded at a time.
        progress: receives the rows whose terms are computed.
        evaluated_rows: of these, so many have exact terms, in two phases (`row_sampling`); None is
            all of them.
    """

    def __init__(
        self,
        data: PreparedData,
        folds: Folds,
        max_rows: int,
        item_chunk: int,
        progress: Progress | None = None,
        evaluated_rows: int | None = None,
    ) -> None:
        self._data = data
        self._progress = progress or Progress()
        self._folds = folds
        held_out = data.train.num_rows * (len(folds.held_out) / folds.number)
        self._share = min(1.0, max_rows / held_out)
        self._chunk = item_chunk
        self._kept: list[tuple[int, EncodedRows]] | None = None
        self.rows = round(min(max_rows, held_out))
        """About the number of rows to evaluate."""
        self._two_phases = evaluated_rows is not None and evaluated_rows < self.rows
        if evaluated_rows is not None:
            self.rows = min(self.rows, evaluated_rows)
        self.evaluated = 0
        """Rows whose exact terms were computed so far."""
        self._order: RowOrder | None = None

    def candidates(
        self,
        candidates: Mapping[str, Sequence[TwoTowerPolicy]],
        regressions: Sequence[str],
        *,
        binary: bool,
        based: Collection[str] = (),
    ) -> EvaluatedCandidates:
        """Leave out regressions with a higher held-out loss.

        On the same rows losses are far less noisy than values, so regressions compete by loss.

        Args:
            regressions: names of the candidates whose logits predict the reward.
            binary: whether all rewards are 0 or 1.
            based: names of the candidates whose item biases hold a base measure.
        """
        loss = {
            name: self.loss(candidates[name], binary=binary, based=name in based)
            for name in regressions
        }
        best = min(loss, key=loss.__getitem__) if loss else None
        left = {n: m for n, m in candidates.items() if n not in loss or n == best}
        scale = {
            n: CLONE_SCALE if n == CLONE else self.scale(m, based=n in based)
            for n, m in left.items()
        }
        return EvaluatedCandidates(left, scale, loss, binary, frozenset(based) & left.keys())

    @torch.no_grad()
    def scale(self, policies: Sequence[TwoTowerPolicy], *, based: bool = False) -> float:
        """Standard deviation of these members' logits between items, over some rows of each; of
        those that are `based`, without the base measure.

        Of a catalogue of which only some items are read, it is at least that between the items of
        these rows: most ids of a large one have no rows, and hence equal logits, so that policies
        in units of the spread of all would be too sharp for the log to show.
        """
        rows = list(self._rows(_SCALE_ROWS))
        number = self._data.items.num_items
        spread = self._spread(
            policies, rows, torch.arange(0, number, max(1, number // _SCALE_ITEMS)), based=based
        )
        if number > _SCALE_ITEMS:
            logged = tensor_of(np.concatenate([part.action for _, part in rows]))
            spread = max(spread, self._spread(policies, rows, logged, based=based))
        # Equal logits are a uniform policy at every temperature; a large one amplifies rounding.
        return spread if spread > 1e-6 else 1.0

    def _spread(
        self,
        policies: Sequence[TwoTowerPolicy],
        parts: Sequence[tuple[int, EncodedRows]],
        some: Tensor,
        *,
        based: bool,
    ) -> float:
        """Standard deviation of the logits between some items, over parts of members' rows."""
        squares: list[Tensor] = []
        embedded = [embed_some(policy, self._data.items, some) for policy in policies]
        items = [without_base(one, based=based)[0] for one in embedded]
        for k, rows in parts:
            context = to_tensors(rows.context, self._data.device)
            logit = logits(policies[k].embed_contexts(context), items[k])
            squares.append(logit.double().var(dim=1, correction=0))
        return float(torch.cat(squares).mean().sqrt())

    @torch.no_grad()
    def loss(
        self, policies: Sequence[TwoTowerPolicy], *, binary: bool, based: bool = False
    ) -> float:
        """Mean loss of members whose logits predict the reward."""
        total, count = 0.0, 0
        for k, rows in self._rows():
            u = policies[k].embed_contexts(to_tensors(rows.context, self._data.device))
            items = embed_some(policies[k], self._data.items, tensor_of(rows.action))
            logit = paired_logits(u, without_base(items, based=based)[0]).double()
            reward = tensor_of(rows.reward, self._data.device).double()
            loss = (
                functional.binary_cross_entropy_with_logits(logit, reward, reduction="sum")
                if binary
                else torch.square(logit - reward).sum()
            )
            total += float(loss)
            count += len(rows)
        return total / max(count, 1)

    @torch.no_grad()
    def terms(
        self,
        candidates: EvaluatedCandidates,
        part: tuple[float, float] = (0.0, 1.0),
        before: HeldOutRows | None = None,
    ) -> HeldOutRows:
        """Compute the terms of candidates on a part of the held-out rows.

        Args:
            part: from which to which share of the rows; disjoint parts have distinct rows.
            before: of the part that ends where this one begins, to which these rows are added.
        """
        policies = candidates.policies
        terms: dict[CandidatePolicy, list[HeldOutTerms]] = {policy: [] for policy in policies}
        parts: list[EncodedRows] = []
        predicted: list[Array] = []
        sizes: list[Array] = []
        eligible_items: list[Array] = []
        keys: list[NDArray[np.uint64]] = []
        for member, rows, size in self._merged(candidates, part):
            block = self._pass(candidates, member, rows)
            for policy, one in block.by_policy(candidates, _pscore(rows)):
                terms[policy].append(one)
            predicted.append(block.action_reward)
            sizes.append(size)
            eligible_items.append(self._eligible_items(rows))
            if not self._folds.by_row:
                keys.append(self._folds.key(rows))
            parts.append(replace(rows.without_context(), eligible=None))
            self._progress.advance(len(rows))
            self.evaluated += len(rows)
        if not parts:
            raise RunError(
                "no row of the log is held out for the choice of objective=auto: raise "
                "auto.held_out_rows, or name an objective"
            )
        key = np.concatenate(keys) if keys else None
        found = HeldOutRows(
            reward=np.concatenate([rows.reward for rows in parts]).astype(np.float64),
            terms={policy: HeldOutTerms.concat(some) for policy, some in terms.items()},
            action_reward=np.concatenate(predicted),
            scale=dict(candidates.scale),
            loss=dict(candidates.loss),
            based=candidates.based,
            unit=None if key is None else numbered_units(key),
            pscore=np.concatenate([_pscore(rows) for rows in parts]),
            eligible_items=np.concatenate(eligible_items),
            unit_key=key,
            sampling_size=np.concatenate(sizes) if self._two_phases else None,
        )
        found = found if before is None else before.merge(found)
        if self._order is None or found.sampling_size is None:
            return found
        count = self._order.count(found.sampling_size, round(part[1] * self.rows))
        return replace(found, count=count)

    def _pass(
        self,
        candidates: EvaluatedCandidates,
        member: int,
        rows: EncodedRows,
        sample: ItemSample | None = None,
    ) -> PassTerms:
        members = {name: policies[member] for name, policies in candidates.members.items()}
        one = ItemPass(self._data.items, self._data.device, self._chunk, sample)
        return one.terms(members, rows, candidates)

    def _merged(
        self, candidates: EvaluatedCandidates, part: tuple[float, float]
    ) -> Iterator[tuple[int, EncodedRows, Array]]:
        """(member, rows that it did not see, sampling sizes), with enough rows for a pass over the
        catalogue."""
        source = self._drawn(candidates, part) if self._two_phases else self._equal(part)
        waiting: dict[int, list[tuple[EncodedRows, Array]]] = {}
        for member, rows, size in source:
            some = waiting.setdefault(member, [])
            some.append((rows, size))
            if sum(len(one) for one, _ in some) >= _PASS_ROWS:
                yield member, *_joined(waiting.pop(member))
        for member, some in waiting.items():
            yield member, *_joined(some)

    def _equal(self, part: tuple[float, float]) -> Iterator[tuple[int, EncodedRows, Array]]:
        for member, rows in self._rows(part=part):
            yield member, rows, np.ones(len(rows))

    def _drawn(
        self, candidates: EvaluatedCandidates, part: tuple[float, float]
    ) -> Iterator[tuple[int, EncodedRows, Array]]:
        """The rows of a part of the second phase."""
        if self._order is None:
            self._order = self._first_phase(candidates)
        first, last = (round(share * self.rows) for share in part)
        drawn = np.zeros(len(self._order.size), dtype=bool)
        drawn[self._order.order[first:last]] = True
        start = 0
        for member, rows in self._rows():
            index = np.flatnonzero(drawn[start : start + len(rows)])
            if len(index):
                yield member, rows.take(index), self._order.size[start + index]
            start += len(rows)

    def _first_phase(self, candidates: EvaluatedCandidates) -> RowOrder:
        """Order the held-out rows by approximate terms of the candidates."""
        kept = list(self._rows())
        logged = np.concatenate([rows.action for _, rows in kept])
        number = self._data.items.num_items
        size = round(FIRST_PHASE * self.rows * number / len(logged))
        seed = derive_seed(self._folds.seed, "auto first phase")
        sample = ItemSample.of(logged, number, max(MIN_SAMPLE, min(_MAX_SAMPLE, size)), seed)
        squares: list[Array] = []
        for member, rows in kept:
            for start in range(0, len(rows), _FIRST_PASS_ROWS):
                some = rows.take(np.arange(start, min(start + _FIRST_PASS_ROWS, len(rows))))
                block = self._pass(candidates, member, some, sample)
                residual = some.reward - block.action_reward
                found = [
                    squared_contribution(one, residual)
                    for _, one in block.by_policy(candidates, _pscore(some))
                ]
                squares.append(np.stack(found, axis=1))
        rewarded = np.concatenate([rows.reward for _, rows in kept]) != 0.0
        key = np.concatenate([rows.row for _, rows in kept])
        return RowOrder.of(row_sizes(np.concatenate(squares), rewarded), key, seed)

    def _eligible_items(self, rows: EncodedRows) -> Array:
        number = self._data.items.num_items
        if rows.eligible is None:
            return np.full(len(rows), float(number))
        return rows.eligible.on().count(number).double().numpy()

    def _rows(
        self, first: int | None = None, part: tuple[float, float] = (0.0, 1.0)
    ) -> Iterator[tuple[int, EncodedRows]]:
        """(member, rows that it did not see).

        Args:
            first: limits the rows of each member, where they are many.
            part: from which to which share of the sample.
        """
        if self._kept is None and (
            self._two_phases or self._share * self._data.train.num_rows <= _KEPT_ROWS
        ):
            self._kept = list(self._read(None, (0.0, 1.0)))
            if self._two_phases:
                self._kept = _by_member(self._kept)
        if self._kept is None:
            yield from self._read(first, part)
            return
        for member, rows in self._kept:
            index = np.flatnonzero(self._sampled(rows, part))
            if self._two_phases:
                index = index[:first]
            if len(index) == len(rows):
                yield member, rows
            elif len(index):
                yield member, rows.take(index)

    def _read(
        self, first: int | None, part: tuple[float, float]
    ) -> Iterator[tuple[int, EncodedRows]]:
        seen = [0] * len(self._folds.held_out)
        for rows in self._data.scan(SCAN_ROWS):
            fold, kept = self._folds.of(rows), self._sampled(rows, part)
            for member, held_out in enumerate(self._folds.held_out):
                index = np.flatnonzero((fold == held_out) & kept)
                if first is not None:
                    index = index[: first - seen[member]]
                if len(index):
                    seen[member] += len(index)
                    yield member, rows.take(index)
            if first is not None and min(seen) >= first:
                return

    def _sampled(self, rows: EncodedRows, part: tuple[float, float]) -> NDArray[np.bool_]:
        return self._folds.sampled(rows, part[0] * self._share, part[1] * self._share)


def _joined(parts: Sequence[tuple[EncodedRows, Array]]) -> tuple[EncodedRows, Array]:
    rows, sizes = zip(*parts, strict=True)
    return EncodedRows.concat(rows), np.concatenate(sizes)


def _by_member(parts: Sequence[tuple[int, EncodedRows]]) -> list[tuple[int, EncodedRows]]:
    members = sorted({member for member, _ in parts})
    return [(m, EncodedRows.concat([rows for k, rows in parts if k == m])) for m in members]


def _pscore(rows: EncodedRows) -> Array:
    assert rows.pscore is not None, "auto requires propensities"
    return rows.pscore.astype(np.float64)
