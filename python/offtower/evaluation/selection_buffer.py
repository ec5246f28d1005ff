"""Estimator selection for judged policies: what is kept of the rows, and what is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.config import SelectionConfig
from offtower.data.log import ParquetLog
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError
from offtower.evaluation.behavior.policies import LoggingPolicies
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring.pair_models import PairRewardModel
from offtower.evaluation.scoring.policy import PolicyScorer, Scored, concatenate
from offtower.evaluation.scoring.sampling import logits_at, rewards_at, terms_and_draws
from offtower.evaluation.selection import (
    METHODS,
    BehaviorDraws,
    BehaviorPolicies,
    DensePolicies,
    NetworkOptions,
    SelectionComparison,
    SelectionLog,
    compare_selectors,
    default_candidates,
)
from offtower.ops.types import RewardTerms

_DENSE_CELLS = 4_000_000
"""Rows x items whose probabilities PAS-IF keeps at most, where it takes all items."""


def check_selection(select: str | None, log: ParquetLog, options: SelectionConfig) -> None:
    """Refuse what cannot be selected, before anything is computed.

    Raises ConfigError for an unknown selector or a log that is too long.
    """
    if select is None:
        return
    if select not in (*METHODS, "all"):
        raise ConfigError(f"--select must be one of {', '.join(METHODS)} or all, got '{select}'")
    if log.num_rows > options.max_rows:
        raise ConfigError(
            f"estimator selection keeps numbers of every row in memory, and this log has "
            f"{log.num_rows:,} rows; pass a part of it with --log (data.split_log cuts one), or "
            f"raise evaluation.selection.max_rows ({options.max_rows:,})"
        )


@dataclass
class LoggingDraws:
    """Items drawn from the policies that made the log, on evenly spaced rows.

    Each row's items are drawn from the policy that logged it, as its propensity says. every: all
    items are taken in place of draws. network: the network is fitted, which reads contexts too.
    stride: every so many rows of the log are taken.
    """

    policies: LoggingPolicies
    draws: int
    every: bool
    network: bool
    stride: int

    @classmethod
    def of(cls, policies: LoggingPolicies, num_rows: int, options: SelectionConfig) -> LoggingDraws:
        """As the configuration says.

        Raises ConfigError where the network is asked for and the catalogue is too large for it.
        """
        items = policies.items(0).embedding.shape[0]
        stride = max(1, -(-num_rows // options.draw_rows))
        network = options.importance_fit == "network"
        cells = -(-num_rows // stride) * items
        if network and cells > _DENSE_CELLS:
            raise ConfigError(
                f"evaluation.selection.importance_fit=network keeps the probabilities of "
                f"{cells // items:,} rows x {items:,} items, and {_DENSE_CELLS:,} at most; lower "
                "evaluation.selection.draw_rows, or use importance_fit=exact"
            )
        every = network or (items <= options.draws and cells <= _DENSE_CELLS)
        return cls(policies, items if every else options.draws, every, network, stride)

    def taken(self, rows: EncodedRows) -> NDArray[np.int64]:
        """Positions of a batch's rows that PAS-IF works on."""
        return np.flatnonzero(rows.row % self.stride == 0)

    @torch.no_grad()
    def draw(
        self, batches: Sequence[EncodedRows], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.float64]]:
        """(m, S) items and log pi_b of them; and (m,) what `LoggingPolicies.check` found.

        batches: the m rows taken, once in the encoding of each logging policy. generator: of the
        draws.
        """
        owner = self.policies.owner(batches[0])
        drawn = torch.empty(len(owner), self.draws, dtype=torch.int64, device="cpu")
        log_behavior = torch.empty_like(drawn, dtype=torch.float64)
        off = np.empty(len(owner))
        for number, batch in enumerate(batches):
            own = np.flatnonzero(owner == number)
            if own.size == 0:
                continue
            rows = batch.take(own)
            policy, items = self.policies.policy(number), self.policies.items(number)
            context = self.policies.embed(number, rows)
            action = torch.from_numpy(rows.action)
            if self.every:
                terms = policy.terms(context, items, action)
                found = torch.arange(self.draws, device="cpu").expand(len(rows), -1)
            else:
                terms, found = terms_and_draws(
                    context,
                    items,
                    action,
                    draws=self.draws,
                    generator=generator,
                    temperature=policy.temperature,
                )
            off[own] = self.policies.check(number, rows, terms.log_prob.double().numpy())
            logit = logits_at(context, items, found, policy.temperature)
            drawn[own] = found
            log_behavior[own] = logit - terms.log_normalizer[:, None].double()
        return drawn, log_behavior, off


class SelectionKeeper:
    """The rows of one policy, as far as a selection needs them: a few float64 numbers a row."""

    def __init__(self) -> None:
        self._rows: dict[str, list[EvaluationRows]] = {}
        self._subset: dict[str, list[EvaluationRows]] = {}
        self._weight: list[NDArray[np.float32]] = []
        self._behavior: list[NDArray[np.float64]] = []
        self._target: list[NDArray[np.float64]] = []
        self._action: list[NDArray[np.int64]] = []
        self._context: list[NDArray[np.float64]] = []
        self._drawn: dict[str, list[NDArray[np.float32]]] = {}

    def add(self, rows: Mapping[str, EvaluationRows]) -> None:
        """A batch's rows by model name; those of "" only where there is no model."""
        for name, part in rows.items():
            if name or len(rows) == 1:
                self._rows.setdefault(name, []).append(_slim(part))

    def absorb(self, other: SelectionKeeper) -> None:
        """Add what was kept of later rows."""
        for mine, others in ((self._rows, other._rows), (self._subset, other._subset)):
            for name, parts in others.items():
                mine.setdefault(name, []).extend(parts)
        for name, values in other._drawn.items():
            self._drawn.setdefault(name, []).extend(values)
        self._weight += other._weight
        self._behavior += other._behavior
        self._target += other._target
        self._action += other._action
        self._context += other._context

    def add_every(
        self,
        log_behavior: torch.Tensor,
        log_target: torch.Tensor,
        action: NDArray[np.int64],
        context: NDArray[np.float64] | None,
    ) -> None:
        """Where the draws are all items: both policies, and what the network reads."""
        self._behavior.append(torch.softmax(log_behavior, dim=1).numpy())
        self._target.append(torch.softmax(log_target, dim=1).numpy())
        self._action.append(action)
        if context is not None:
            self._context.append(context)

    @torch.no_grad()
    def add_draws(
        self,
        scorer: PolicyScorer,
        scored: Scored,
        taken: NDArray[np.int64],
        drawn: torch.Tensor,
        log_behavior: torch.Tensor,
        models: Mapping[str, RewardTerms | tuple[PairRewardModel, EncodedRows]],
    ) -> torch.Tensor:
        """What the policy and the models make of items drawn from the logging policy.

        models: of the rows taken: q over the catalogue, or a model over pairs with its rows.
        Returns the policy's log-probabilities (m, S) of the items.
        """
        context = scored.context_embedding[taken]
        logit = logits_at(context, scorer.items, drawn, scorer.policy.temperature)
        log_target = logit - scored.log_normalizer[taken][:, None].double()
        self._weight.append(torch.exp(log_target - log_behavior).float().numpy())
        for name, model in models.items():
            if isinstance(model, tuple):
                value = model[0].at(model[1], drawn.numpy()).astype(np.float32)
            else:
                value = rewards_at(model, drawn).float().numpy()
            self._drawn.setdefault(name, []).append(value)
        for name, part in scored.rows.items():
            if name or len(scored.rows) == 1:
                self._subset.setdefault(name, []).append(_slim(part.take(taken)))
        return log_target

    def choose(
        self,
        select: str,
        options: SelectionConfig,
        seed: int,
        *,
        refused: Mapping[str, str | None],
        behavior: BehaviorPolicies | None,
        item_features: NDArray[np.float64] | None = None,
    ) -> SelectionComparison:
        """Which estimator to believe, among the default candidates tuned by SLOPE.

        refused: by selector, why the draws of PAS-IF are not used, or why the heuristic cannot run.
        behavior: the behaviour policies' numbers of every row, for the heuristic. item_features:
        (N, e), for the network.
        """
        log = replace(self._log(self._rows), policies=behavior)
        drawn_log = None
        if self._weight and refused["pasif"] is None:
            drawn_log = self._drawn_log(item_features)
        pasif: dict[str, Any] = {"share": options.share, "repetitions": options.repetitions}
        if drawn_log is not None and options.importance_fit == "network":
            pasif["importance_fit"] = "network"
            pasif["network"] = NetworkOptions(epochs=options.network_steps)
        methods = list(METHODS) if select == "all" else [select]
        heuristic = refused["heuristic"]
        if heuristic is not None:
            methods.remove("heuristic")
        found = compare_selectors(
            log,
            default_candidates(log.problem),
            methods=methods,
            seed=seed,
            options={"pasif": pasif},
            logs={} if drawn_log is None else {"pasif": drawn_log},
        )
        if heuristic is None:
            return found
        return replace(found, failed={**found.failed, "heuristic": heuristic})

    def _drawn_log(self, item_features: NDArray[np.float64] | None) -> SelectionLog:
        """The rows for which the logging policy is known: over all items, or at draws."""
        predictions: dict[str, Any] = {
            name: np.concatenate(parts) for name, parts in self._drawn.items()
        }
        if not self._behavior:
            weight: Any = np.concatenate(self._weight)
            return self._log(self._subset, BehaviorDraws(weight, predictions))
        source = DensePolicies(
            np.concatenate(self._behavior),
            np.concatenate(self._target),
            np.concatenate(self._action),
            predictions,
            np.concatenate(self._context) if self._context else None,
            item_features,
        )
        return replace(self._log(self._subset), source=source)

    @staticmethod
    def _log(
        parts: Mapping[str, list[EvaluationRows]], draws: BehaviorDraws | None = None
    ) -> SelectionLog:
        rows = {name: concatenate(each) for name, each in parts.items()}
        if set(rows) == {""}:
            return SelectionLog.from_rows(rows[""], draws=draws)
        # The reward models were fitted on the training log, which this one is not.
        return SelectionLog.from_rows(rows, draws=draws, independent_models=frozenset(rows))


def _slim(rows: EvaluationRows) -> EvaluationRows:
    return EvaluationRows(
        rows.importance_weight, rows.reward, rows.action_reward, rows.expected_reward
    )
