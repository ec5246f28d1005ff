"""A policy and a log -> the rows that estimators take, streamed through the fused operators."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from offtower.data.encoding import to_tensors
from offtower.data.rows import EncodedRows
from offtower.errors import DataError
from offtower.evaluation.rows import EvaluationRows
from offtower.models.items import DEFAULT_CHUNK, ItemEmbeddings, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import DenseReward, FactoredReward

RewardTerms = DenseReward | FactoredReward


class PolicyScorer:
    """Scores rows with a frozen policy; the catalogue is embedded once.

    Args:
        policy: put into evaluation mode.
        items: features of the catalogue that the rows' actions index.
        item_chunk: items embedded at a time.
    """

    def __init__(
        self,
        policy: TwoTowerPolicy,
        items: ItemFeatures,
        item_chunk: int = DEFAULT_CHUNK,
    ) -> None:
        self.policy = policy
        self._training = policy.training
        policy.eval()
        with torch.no_grad():
            self.items: ItemEmbeddings = policy.embed_items(items, chunk=item_chunk)
        policy.train(self._training)

    @torch.no_grad()
    def score(self, rows: EncodedRows, reward: RewardTerms | None = None) -> EvaluationRows:
        """Weights, rewards and reward-model terms of a batch of logged rows.

        Args:
            rows: n rows.
            reward: q of these rows and all items, for DM and DR; None leaves those columns out.
        """
        if rows.pscore is None:
            raise DataError(
                "off-policy evaluation needs the logged propensities: "
                "name their column as 'pscore' in the log's schema"
            )
        self.policy.eval()
        context_embedding = self.policy.embed_contexts(to_tensors(rows.context))
        terms = self.policy.terms(
            context_embedding,
            self.items,
            torch.from_numpy(rows.action),
            reward_model=reward,
        )
        self.policy.train(self._training)
        log_weight = terms.log_prob.double().numpy() - np.log(rows.pscore)
        return EvaluationRows(
            importance_weight=np.exp(log_weight),
            reward=rows.reward.astype(np.float64),
            action_reward=_float64(terms.action_reward),
            expected_reward=_float64(terms.expected_reward),
            user=None if rows.user_id is None else rows.user_id.view(np.int64),
            row=rows.row,
            log_weight=log_weight,
        )


def concatenate(parts: Iterable[EvaluationRows]) -> EvaluationRows:
    """All parts in one; columns that a part lacks are left out."""
    collected = list(parts)

    def column(name: str) -> np.ndarray | None:
        values = [getattr(part, name) for part in collected]
        return None if any(v is None for v in values) else np.concatenate(values)

    weight, reward = column("importance_weight"), column("reward")
    if weight is None or reward is None:
        raise DataError("the log has no rows to evaluate on")
    return EvaluationRows(
        importance_weight=weight,
        reward=reward,
        action_reward=column("action_reward"),
        expected_reward=column("expected_reward"),
        user=column("user"),
        row=column("row"),
        log_weight=column("log_weight"),
    )


def _float64(values: torch.Tensor | None) -> np.ndarray | None:
    return None if values is None else values.double().numpy()
