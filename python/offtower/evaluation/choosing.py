"""Estimator selection for judged policies: what is kept of the rows, and what is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.config import SelectionConfig
from offtower.data.log import ParquetLog
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError
from offtower.evaluation.draws import RewardTerms, rewards_at, terms_and_draws
from offtower.evaluation.pair_models import PairRewardModel
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring import PolicyScorer, Scored, concatenate
from offtower.evaluation.selection import (
    METHODS,
    BehaviorDraws,
    SelectionComparison,
    SelectionLog,
    compare_selectors,
    default_candidates,
)
from offtower.models.items import ItemEmbeddings

_WRONG_PROPENSITY = 0.01
"""Median distance of log-probabilities beyond which a run did not make the log."""


def check_selection(select: str | None, log: ParquetLog, options: SelectionConfig) -> None:
    """Refuse an unknown selector, or a log that is too long, before anything is computed."""
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
    """Items drawn from the run that made the log, on evenly spaced rows.

    scorer: of that run. stride: every so many rows of the log are taken.
    """

    scorer: PolicyScorer
    draws: int
    stride: int

    def taken(self, rows: EncodedRows) -> NDArray[np.int64]:
        """Positions of a batch's rows that PAS-IF works on."""
        return np.flatnonzero(rows.row % self.stride == 0)

    @torch.no_grad()
    def draw(
        self, rows: EncodedRows, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.float64]]:
        """(m, S) items and log pi_b of them, for the rows taken (in the run's own encoding); and
        (m,) distances of the run's log-probabilities of the logged items from the logged ones."""
        from offtower.data.encoding import to_tensors

        policy, items = self.scorer.policy, self.scorer.items
        context = policy.embed_contexts(to_tensors(rows.context))
        terms, drawn = terms_and_draws(
            context,
            items,
            torch.from_numpy(rows.action),
            draws=self.draws,
            generator=generator,
            temperature=policy.temperature,
        )
        assert rows.pscore is not None
        off = np.abs(terms.log_prob.double().numpy() - np.log(rows.pscore))
        logit = _logits(context, items, drawn, policy.temperature)
        return drawn, logit - terms.log_normalizer[:, None].double(), off


def logging_refusal(off: Sequence[NDArray[np.float64]]) -> str | None:
    """Why draws are not from the policy that logged, by the distances that `LoggingDraws.draw`
    found; None where they may be."""
    distance = float(np.median(np.concatenate(off))) if off else 0.0
    if distance <= _WRONG_PROPENSITY:
        return None
    return (
        "evaluation.selection.logging_run did not make this log: its probabilities of the "
        f"logged items differ from the logged ones by a factor of {np.exp(distance):.3g} "
        "(median); PAS-IF uses logged propensities only"
    )


class SelectionKeeper:
    """The rows of one policy, as far as a selection needs them: a few float64 numbers a row."""

    def __init__(self) -> None:
        self._rows: dict[str, list[EvaluationRows]] = {}
        self._subset: dict[str, list[EvaluationRows]] = {}
        self._weight: list[NDArray[np.float32]] = []
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
        self._weight += other._weight
        for name, values in other._drawn.items():
            self._drawn.setdefault(name, []).extend(values)

    @torch.no_grad()
    def add_draws(
        self,
        scorer: PolicyScorer,
        scored: Scored,
        taken: NDArray[np.int64],
        drawn: torch.Tensor,
        log_behavior: torch.Tensor,
        models: Mapping[str, RewardTerms | tuple[PairRewardModel, EncodedRows]],
    ) -> None:
        """What the policy and the models make of items drawn from the logging policy.

        models: of the rows taken: q over the catalogue, or a model over pairs with its rows.
        """
        context = scored.context_embedding[taken]
        logit = _logits(context, scorer.items, drawn, scorer.policy.temperature)
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

    def choose(
        self, select: str, options: SelectionConfig, seed: int, refusal: str | None
    ) -> SelectionComparison:
        """Which estimator to believe, among the default candidates tuned by SLOPE."""
        log = self._log(self._rows)
        drawn_log = None
        if self._weight and refusal is None:
            draws = BehaviorDraws(
                np.concatenate(self._weight),
                {name: np.concatenate(parts) for name, parts in self._drawn.items()},
            )
            drawn_log = self._log(self._subset, draws)
        pasif = {"share": options.share, "repetitions": options.repetitions}
        methods: Sequence[str] | None = None if select == "all" else [select]
        return compare_selectors(
            log,
            default_candidates(log.problem),
            methods=methods,
            seed=seed,
            options={"pasif": pasif},
            logs={} if drawn_log is None else {"pasif": drawn_log},
        )

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


def _logits(
    context: torch.Tensor, items: ItemEmbeddings, item: torch.Tensor, temperature: float
) -> torch.Tensor:
    """(m, S) float64 logits of the items (m, S), a block of rows at a time."""
    out = torch.empty(item.shape, dtype=torch.float64)
    step = max(1, (1 << 22) // max(1, item.shape[1] * context.shape[1]))
    for start in range(0, len(item), step):
        part = slice(start, start + step)
        logit = torch.einsum("bd,bsd->bs", context[part], items.embedding[item[part]])
        logit = logit.double() / temperature
        if items.bias is not None:
            logit = logit + items.bias[item[part]].double()
        out[part] = logit
    return out
