"""Measurements on logging policies, batch by batch: support, PAS-IF's draws, the heuristic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.config import SelectionConfig
from offtower.data.encoding import FeatureEncoding
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError
from offtower.evaluation.behavior.columns import LoggingColumns
from offtower.evaluation.behavior.policies import LoggingPolicies
from offtower.evaluation.rows import Array, IntArray
from offtower.evaluation.scoring.batches import ScoredBatch
from offtower.evaluation.scoring.policy import ScoredRows
from offtower.evaluation.scoring.rewards import BatchReward, EvaluationModel
from offtower.evaluation.selection import BehaviorPolicies
from offtower.models.reward.dense import flatten
from offtower.seeds import derive_seed

SUPPORT_ROWS = 2_000
"""Rows whose support is probed: evenly spaced ones of a longer log."""
SUPPORT_DRAWS = 10
"""Items drawn from each evaluated policy for each of them."""
MAX_DENSE_CELLS = 4_000_000
"""Rows x items whose probabilities PAS-IF keeps at most, where it takes all items."""


@dataclass(frozen=True)
class SupportSample:
    """S items for each of m rows, drawn from each evaluated policy.

    difference: (m,) of the logging policy's log-probabilities from the logged ones.
    log_target, log_behavior: by evaluated policy, (m, S) log-probabilities of the items under it
    and under the policy that logged the row.
    """

    difference: Array
    log_target: dict[str, Array]
    log_behavior: dict[str, Array]


@dataclass(frozen=True)
class SupportProbe:
    """Draws items from the evaluated policies and takes their probabilities in the logging ones."""

    policies: LoggingPolicies
    num_rows: int
    seed: int

    @torch.no_grad()
    def measure(
        self, number: int, scored: Mapping[str, ScoredRows], behavior: Sequence[EncodedRows]
    ) -> SupportSample | None:
        """Sample a batch; None where none of its rows is probed.

        number: of the batch. scored: by evaluated policy. behavior: in each logging policy's
        encoding.
        """
        stride = max(1, -(-self.num_rows // SUPPORT_ROWS))
        taken = np.flatnonzero(behavior[0].row % stride == 0)
        if taken.size == 0:
            return None
        drawn, log_target = {}, {}
        for index, (name, one) in enumerate(scored.items()):
            seed = derive_seed(self.seed, "support draws", index, number)
            drawn[name], log_prob = one.scorer.served.draw(
                one.context_embedding[taken],
                one.scorer.items,
                SUPPORT_DRAWS,
                torch.Generator().manual_seed(seed),
                one.eligible_at(taken),
            )
            log_target[name] = log_prob.double().numpy()
        log_behavior = {name: np.empty(items.shape) for name, items in drawn.items()}
        owner = self.policies.owner(behavior[0].take(taken))
        difference = np.empty(len(owner))
        for index, batch in enumerate(behavior):
            own = np.flatnonzero(owner == index)
            if own.size == 0:
                continue
            rows = batch.take(taken[own])
            context = self.policies.embed(index, rows)
            terms = self.policies.terms(index, context, rows)
            difference[own] = self.policies.check(index, rows, terms.log_prob.double().numpy())
            for name, items in drawn.items():
                log_behavior[name][own] = self.policies.log_prob_at(
                    index, context, items[own], terms, rows
                )
        return SupportSample(difference, log_target, log_behavior)


@dataclass(frozen=True)
class PasifSampling:
    """S items a row, drawn or all of the catalogue, on every stride-th row."""

    draws: int
    all_items: bool
    stride: int

    @classmethod
    def of(cls, num_items: int, num_rows: int, options: SelectionConfig) -> PasifSampling:
        """As the configuration says.

        Raises ConfigError for the network where the catalogue is too large for it.
        """
        stride = max(1, -(-num_rows // options.draw_rows))
        network = options.importance_fit == "network"
        cells = -(-num_rows // stride) * num_items
        if network and cells > MAX_DENSE_CELLS:
            raise ConfigError(
                f"evaluation.selection.importance_fit=network keeps the probabilities of "
                f"{cells // num_items:,} rows x {num_items:,} items, and {MAX_DENSE_CELLS:,} at "
                "most; lower evaluation.selection.draw_rows, or use importance_fit=exact"
            )
        all_items = network or (num_items <= options.draws and cells <= MAX_DENSE_CELLS)
        return cls(num_items if all_items else options.draws, all_items, stride)


@dataclass(frozen=True)
class PasifSample:
    """S items for each of m rows, drawn from the policy that logged the row, or all N items.

    Attributes:
        row: (m,) number in the log.
        difference: (m,) of the logging policy's log-probabilities from the logged ones.
        weight: by evaluated policy, (m, S) its probability over the logging policy's, float32.
        predictions: by reward model, (m, S) float32.
        behavior: (m, N) probabilities, where all items are taken. target: likewise, by policy.
        action: (m,) logged items. context: (m, p) features for the network, where it is fitted.
    """

    row: IntArray
    difference: Array
    weight: dict[str, NDArray[np.float32]]
    predictions: dict[str, NDArray[np.float32]]
    behavior: Array | None
    target: dict[str, Array]
    action: IntArray
    context: Array | None


@dataclass(frozen=True)
class PasifSampler:
    """Draws items from the policies that made the log, on evenly spaced rows.

    context_encoding: for the network, which reads contexts; None without it.
    """

    policies: LoggingPolicies
    sampling: PasifSampling
    context_encoding: FeatureEncoding | None
    seed: int

    @torch.no_grad()
    def measure(self, batch: ScoredBatch, models: Sequence[EvaluationModel]) -> PasifSample | None:
        """Sample a batch, with the models' predictions; None where none of its rows is taken."""
        rows = batch.encoded[0]
        taken = np.flatnonzero(rows.row % self.sampling.stride == 0)
        if taken.size == 0:
            return None
        seed = derive_seed(self.seed, "logging draws", batch.number)
        item, log_behavior, difference = self._draw(
            [one.take(taken) for one in batch.behavior], torch.Generator().manual_seed(seed)
        )
        rows = rows.take(taken)
        context = None
        if self.context_encoding is not None:
            context = flatten(self.context_encoding, rows.context, len(rows), "log")
        predictions = {
            model.name: model.on(batch.encoded[model.owner].take(taken)).at(item).astype(np.float32)
            for model in models
        }
        weight, target = {}, {}
        for name, one in batch.scored.items():
            log_target = one.log_prob_at(item, taken)
            # An item that neither policy may show has weight 0, not exp(inf - inf).
            never = torch.isinf(log_target)
            log_weight = (log_target - log_behavior).masked_fill(never, -torch.inf)
            weight[name] = torch.exp(log_weight).float().numpy()
            if self.sampling.all_items:
                target[name] = torch.softmax(log_target, dim=1).numpy()
        behavior = torch.softmax(log_behavior, dim=1).numpy() if self.sampling.all_items else None
        return PasifSample(
            rows.row, difference, weight, predictions, behavior, target, rows.action, context
        )

    def _draw(
        self, behavior: Sequence[EncodedRows], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, Array]:
        """(m, S) items and log pi_b of them, and (m,) differences from the logged propensities.

        behavior: the m rows in the encoding of each logging policy.
        """
        sampling, owner = self.sampling, self.policies.owner(behavior[0])
        item = torch.empty(len(owner), sampling.draws, dtype=torch.int64, device="cpu")
        log_behavior = torch.empty_like(item, dtype=torch.float64)
        difference = np.empty(len(owner))
        for index, batch in enumerate(behavior):
            own = np.flatnonzero(owner == index)
            if own.size == 0:
                continue
            rows = batch.take(own)
            context = self.policies.embed(index, rows)
            if sampling.all_items:
                terms = self.policies.terms(index, context, rows)
                found = torch.arange(sampling.draws, device="cpu").expand(len(rows), -1)
            else:
                terms, found = self.policies.scorers[index].served.terms_and_draws(
                    context,
                    self.policies.scorers[index].items,
                    torch.from_numpy(rows.action),
                    draws=sampling.draws,
                    generator=generator,
                    eligible=self.policies.eligible(rows),
                    position=self.policies.position(rows),
                )
            difference[own] = self.policies.check(index, rows, terms.log_prob.double().numpy())
            item[own] = found
            log_behavior[own] = self.policies.log_prob_at(index, context, found, terms, rows)
        return item, log_behavior, difference


@dataclass(frozen=True)
class HeuristicProbe:
    """Each behavior policy's probabilities and expected rewards, from runs or from columns."""

    source: LoggingPolicies | LoggingColumns
    draws: int
    seed: int

    def measure(
        self,
        number: int,
        rows: EncodedRows,
        behavior: Sequence[EncodedRows],
        rewards: Mapping[str, BatchReward],
    ) -> BehaviorPolicies:
        """Numbers of a batch's rows.

        number: of the batch. behavior: its rows in the encoding of each run. rewards: the reward
        models on them.
        """
        if isinstance(self.source, LoggingColumns):
            assert rows.behavior_policy is not None
            owner = self.source.names.index(rows.behavior_policy)
            return BehaviorPolicies(owner, self.source.of(rows))
        owner = self.source.owner(rows)
        probability = np.empty((len(rows), len(behavior)))
        expected = {name: np.empty(probability.shape) for name in rewards}
        for index, batch in enumerate(behavior):
            seed = derive_seed(self.seed, "behavior draws", index, number)
            scored = self.source.scorers[index].score_models(
                batch,
                rewards,
                draws=self.draws,
                generator=torch.Generator().manual_seed(seed),
            )
            log_weight = scored.weighted.log_weight
            assert log_weight is not None and batch.pscore is not None
            log_prob = log_weight + np.log(batch.pscore)
            own = np.flatnonzero(owner == index)
            self.source.check(index, batch.take(own), log_prob[own])
            probability[:, index] = np.exp(log_prob)
            for name, found in scored.predictions.items():
                expected[name][:, index] = found.expected_reward
        return BehaviorPolicies(owner, probability, expected)
