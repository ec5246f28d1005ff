"""Weights and expected rewards of candidates on the rows that their members did not see."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from offtower.data.encoding import tensor_of, to_tensors
from offtower.data.order import keyed_hash
from offtower.data.rows import EncodedRows
from offtower.errors import RunError
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.seeds import derive_seed
from offtower.training.auto.folds import Folds
from offtower.training.auto.item_pass import ItemPass, logits
from offtower.training.auto.prior_order import CLONE
from offtower.training.sampled import embed_some

INVERSE_TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""In units of 1 / (standard deviation of a candidate's logits between items)."""

CLONE_SCALE = 4.0
"""In place of that deviation for the clone of the logging policy, whose scores are log
probabilities: it is evaluated as it is, at 1, and up to eight times as sharp."""

SCAN_ROWS = 4096
_SCALE_ROWS = 256
_SCALE_ITEMS = 4096
_PASS_ROWS = 1024
"""Rows of a member that share a pass over the catalogue, at least."""
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
class EvaluatedCandidates:
    """Candidates of which at most one predicts rewards."""

    members: Mapping[str, Sequence[TwoTowerPolicy]]
    scale: Mapping[str, float]
    """Standard deviation of each candidate's logits between items; `CLONE_SCALE` for the clone."""
    loss: Mapping[str, float]
    """Held-out losses of the regressions that were compared."""
    binary: bool
    """Whether the reward model's logits are those of probabilities."""

    def without(self, names: Collection[str]) -> EvaluatedCandidates:
        return replace(
            self,
            members={name: one for name, one in self.members.items() if name not in names},
            scale={name: one for name, one in self.scale.items() if name not in names},
        )

    def inverse_temperatures(self, name: str) -> list[float]:
        """Of a candidate's policies, ascending."""
        return [s / self.scale[name] for s in INVERSE_TEMPERATURES]

    @property
    def reward_model(self) -> str | None:
        """The regression among the candidates."""
        return next((name for name in self.loss if name in self.members), None)


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
    unit_key: NDArray[np.uint64] | None = None
    """(n,) keys that `unit` numbers; None where folds are by row."""
    count: Array | None = None
    """(n,) rows of the log that each one stands for, one over the probability with which it was
    sampled (Horvitz and Thompson 1952, "A generalization of sampling without replacement from a
    finite universe"); None is 1 for all."""

    @property
    def size(self) -> float:
        """Number of rows that these stand for."""
        return float(len(self.reward) if self.count is None else self.count.sum())

    @property
    def effective_size(self) -> float:
        """Number of equally counted rows whose mean has the same variance (Kish 1965)."""
        if self.count is None:
            return self.size
        return self.size**2 / float(np.square(self.count).sum())

    def mean(self, values: Array) -> Any:
        """Mean over the rows that these stand for, of (n,) or (n, k) values: a number or (k,)."""
        if self.count is None:
            return values.mean(axis=0)
        return self.count @ values / self.size

    @cached_property
    def inverse_pscore(self) -> float:
        """Mean of 1 / pscore (N where all items may be shown): about the weight of a row that shows
        the item of a sharp policy."""
        return float(self.mean(np.reciprocal(self.pscore)))

    def policies(self, name: str) -> list[CandidatePolicy]:
        """One candidate's policies in ascending inverse temperature."""
        return [policy for policy in self.terms if policy.name == name]

    def without(self, names: Collection[str]) -> HeldOutRows:
        """The same rows for the other candidates."""
        return replace(
            self,
            terms={policy: one for policy, one in self.terms.items() if policy.name not in names},
            scale={name: one for name, one in self.scale.items() if name not in names},
        )

    def merge(self, other: HeldOutRows) -> HeldOutRows:
        """Add other rows of the same candidates."""
        key = None
        if self.unit_key is not None and other.unit_key is not None:
            key = np.concatenate([self.unit_key, other.unit_key])
        return replace(
            self,
            reward=np.concatenate([self.reward, other.reward]),
            terms={
                policy: HeldOutTerms(
                    np.concatenate([one.weight, other.terms[policy].weight]),
                    np.concatenate([one.expected_reward, other.terms[policy].expected_reward]),
                )
                for policy, one in self.terms.items()
            },
            action_reward=np.concatenate([self.action_reward, other.action_reward]),
            unit=None if key is None else _numbered(key),
            unit_key=key,
            pscore=np.concatenate([self.pscore, other.pscore]),
            eligible_items=np.concatenate([self.eligible_items, other.eligible_items]),
            count=None
            if self.count is None or other.count is None
            else np.concatenate([self.count, other.count]),
        )


class HeldOutEvaluator:
    """Evaluates candidates' members out of fold.

    Args:
        data: its training log is read.
        folds: the fold that each member did not see.
        max_rows: a longer log is sampled by a keyed hash of the row.
        item_chunk: items embedded at a time.
        progress: receives the rows whose terms are computed.
        thinning: one in so many rows without reward is evaluated, by a keyed hash, and stands for
            all of them: where few rows have a reward, most of the evidence is in those.
    """

    def __init__(
        self,
        data: PreparedData,
        folds: Folds,
        max_rows: int,
        item_chunk: int,
        progress: Progress | None = None,
        thinning: int = 1,
    ) -> None:
        self._data = data
        self._thinning = thinning
        self._progress = progress or Progress()
        self._folds = folds
        held_out = data.train.num_rows * (len(folds.held_out) / folds.number)
        rewarded = data.facts.mean_reward if data.facts.binary_reward else 0.5
        self.rows = round(min(max_rows, held_out) * (rewarded + (1.0 - rewarded) / thinning))
        """About the number of rows to evaluate."""
        self.evaluated = 0
        """Rows whose terms were computed so far."""
        self._share = min(1.0, max_rows / held_out)
        self._chunk = item_chunk
        self._kept: list[tuple[int, EncodedRows]] | None = None

    def candidates(
        self,
        candidates: Mapping[str, Sequence[TwoTowerPolicy]],
        regressions: Sequence[str],
        *,
        binary: bool,
    ) -> EvaluatedCandidates:
        """Leave out regressions with a higher held-out loss.

        On the same rows losses are far less noisy than values, so regressions compete by loss.

        Args:
            regressions: names of the candidates whose logits predict the reward.
            binary: whether all rewards are 0 or 1.
        """
        loss = {name: self.loss(candidates[name], binary=binary) for name in regressions}
        best = min(loss, key=loss.__getitem__) if loss else None
        left = {n: m for n, m in candidates.items() if n not in loss or n == best}
        scale = {n: CLONE_SCALE if n == CLONE else self.scale(m) for n, m in left.items()}
        return EvaluatedCandidates(left, scale, loss, binary)

    @torch.no_grad()
    def scale(self, policies: Sequence[TwoTowerPolicy]) -> float:
        """Standard deviation of these members' logits between items, over some rows of each.

        Of a catalogue of which only some items are read, it is at least that between the items of
        these rows: most ids of a large one have no rows, and hence equal logits, so that policies
        in units of the spread of all would be too sharp for the log to show.
        """
        rows = list(self._rows(_SCALE_ROWS))
        number = self._data.items.num_items
        spread = self._spread(
            policies, rows, torch.arange(0, number, max(1, number // _SCALE_ITEMS))
        )
        if number > _SCALE_ITEMS:
            logged = tensor_of(np.concatenate([part.action for _, part in rows]))
            spread = max(spread, self._spread(policies, rows, logged))
        # Equal logits are a uniform policy at every temperature; a large one amplifies rounding.
        return spread if spread > 1e-6 else 1.0

    def _spread(
        self,
        policies: Sequence[TwoTowerPolicy],
        parts: Sequence[tuple[int, EncodedRows]],
        some: Tensor,
    ) -> float:
        """Standard deviation of the logits between some items, over parts of members' rows."""
        squares: list[Tensor] = []
        counts: list[Tensor] = []
        items = [embed_some(policy, self._data.items, some) for policy in policies]
        for k, rows in parts:
            context = to_tensors(rows.context, self._data.device)
            logit = logits(policies[k].embed_contexts(context), items[k])
            count = tensor_of(self._count(rows), self._data.device)
            squares.append(logit.double().var(dim=1, correction=0) * count)
            counts.append(count)
        return float((torch.cat(squares).sum() / torch.cat(counts).sum()).sqrt())

    @torch.no_grad()
    def loss(self, policies: Sequence[TwoTowerPolicy], *, binary: bool) -> float:
        """Mean loss of members whose logits predict the reward."""
        total = count = 0.0
        for k, rows in self._rows():
            context = to_tensors(rows.context, self._data.device)
            item = self._data.items.at(tensor_of(rows.action))
            logit = policies[k].action_logit(context, item).double()
            reward = tensor_of(rows.reward, self._data.device).double()
            loss = (
                functional.binary_cross_entropy_with_logits(logit, reward, reduction="none")
                if binary
                else torch.square(logit - reward)
            )
            one = self._count(rows)
            total += float(loss @ tensor_of(one, self._data.device))
            count += float(one.sum())
        return total / max(count, 1.0)

    @torch.no_grad()
    def terms(
        self, candidates: EvaluatedCandidates, part: tuple[float, float] = (0.0, 1.0)
    ) -> HeldOutRows:
        """Compute the terms of candidates on a part of the held-out rows.

        Args:
            part: from which to which share of the rows; disjoint parts have distinct rows.
        """
        policies = [
            CandidatePolicy(name, s)
            for name in candidates.members
            for s in candidates.inverse_temperatures(name)
        ]
        weight: dict[CandidatePolicy, list[Array]] = {policy: [] for policy in policies}
        expected: dict[CandidatePolicy, list[Array]] = {policy: [] for policy in policies}
        reward: list[Array] = []
        predicted: list[Array] = []
        units: list[NDArray[np.uint64]] = []
        pscore: list[Array] = []
        eligible_items: list[Array] = []
        counts: list[Array] = []
        for k, rows in _merged(self._rows(part=part)):
            assert rows.pscore is not None, "auto requires propensities"
            pscore.append(rows.pscore.astype(np.float64))
            eligible_items.append(self._eligible_items(rows))
            reward.append(rows.reward.astype(np.float64))
            block = ItemPass(self._data.items, self._data.device, self._chunk).terms(
                {name: members[k] for name, members in candidates.members.items()}, rows, candidates
            )
            predicted.append(block.action_reward)
            log_pscore = np.log(pscore[-1])
            for name in candidates.members:
                for t, policy in enumerate(p for p in policies if p.name == name):
                    weight[policy].append(np.exp(block.log_prob[name][t] - log_pscore))
                    expected[policy].append(block.expected_reward[name][t])
            self._progress.advance(len(rows))
            self.evaluated += len(rows)
            counts.append(self._count(rows))
            if not self._folds.by_row:
                units.append(self._folds.key(rows))
        if not reward:
            raise RunError(
                "no row of the log is held out for the choice of objective=auto: raise "
                "auto.held_out_rows, or name an objective"
            )
        key = np.concatenate(units) if units else None
        return HeldOutRows(
            reward=np.concatenate(reward),
            terms={
                policy: HeldOutTerms(
                    np.concatenate(weight[policy]), np.concatenate(expected[policy])
                )
                for policy in policies
            },
            action_reward=np.concatenate(predicted),
            scale=dict(candidates.scale),
            loss=dict(candidates.loss),
            unit=None if key is None else _numbered(key),
            pscore=np.concatenate(pscore),
            eligible_items=np.concatenate(eligible_items),
            unit_key=key,
            count=None if self._thinning == 1 else np.concatenate(counts),
        )

    def _count(self, rows: EncodedRows) -> Array:
        """(n,) number of rows that each one stands for."""
        return np.where(rows.reward == 0.0, float(self._thinning), 1.0)

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
            first: limits the rows of each member.
            part: from which to which share of the sample.
        """
        sampled = self._share * self._data.train.num_rows / self._thinning
        if self._kept is None and sampled <= _KEPT_ROWS:
            self._kept = list(self._read(None, (0.0, 1.0)))
        if self._kept is None:
            yield from self._read(first, part)
            return
        for member, rows in self._kept:
            index = np.flatnonzero(self._sampled(rows, part))
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
        found = self._folds.sampled(rows, part[0] * self._share, part[1] * self._share)
        if self._thinning == 1:
            return found
        seed = derive_seed(self._folds.seed, "auto thinning")
        kept = keyed_hash(rows.row, seed) < np.uint64(2**64 // self._thinning)
        found &= (rows.reward != 0.0) | kept
        return found


def _merged(parts: Iterable[tuple[int, EncodedRows]]) -> Iterator[tuple[int, EncodedRows]]:
    """Join rows of the same member, so that a pass over the catalogue has enough of them."""
    waiting: dict[int, list[EncodedRows]] = {}
    for member, rows in parts:
        some = waiting.setdefault(member, [])
        some.append(rows)
        if sum(map(len, some)) >= _PASS_ROWS:
            yield member, EncodedRows.concat(waiting.pop(member))
    for member, some in waiting.items():
        yield member, EncodedRows.concat(some)


def _numbered(keys: NDArray[np.uint64]) -> NDArray[np.int64] | None:
    distinct, number = np.unique(keys, return_inverse=True)
    return None if len(distinct) == len(keys) else number.astype(np.int64)
