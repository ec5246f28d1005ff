"""A policy and a log -> the rows that estimators take, streamed through the fused operators."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offtower.data.encoding import tensor_of, to_tensors
from offtower.data.rows import EncodedRows
from offtower.errors import DataError
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring.pair_models import PairRewardModel
from offtower.evaluation.scoring.sampling import rewards_at, terms_and_draws
from offtower.models.items import DEFAULT_CHUNK, ItemEmbeddings, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.ops import PolicyTerms
from offtower.ops.types import RewardTerms


@dataclass(frozen=True)
class JudgingModel:
    """A reward model as a scorer uses it.

    Attributes:
        name: of its rows: linear, trees, two_tower or dense.
        owner: position of the run whose encoding it reads.
        exact: gives q over the whole catalogue. pairs: predicts pairs. One of the two is there.
    """

    name: str
    owner: int
    exact: RewardModel | None = None
    pairs: PairRewardModel | None = None

    def over_all(self, rows: EncodedRows) -> RewardTerms:
        """q of these rows and all items; of a model over pairs only where those are not many."""
        if self.exact is not None:
            return self.exact.for_new_rows(rows)
        assert self.pairs is not None, "a model is one or the other"
        return self.pairs.everywhere(rows)


@dataclass(frozen=True)
class ModelTerms:
    """The reward models' terms on a batch, by model name: arguments of `PolicyScorer.score_models`.

    exact: q over the catalogue. at_draws: the same, to be averaged over draws. pairs: models over
    pairs, with the rows in their own encoding.
    """

    exact: dict[str, RewardTerms]
    at_draws: dict[str, RewardTerms]
    pairs: dict[str, tuple[PairRewardModel, EncodedRows]]


@dataclass(frozen=True)
class Scored:
    """A batch as one policy sees it.

    rows: by model name; "" is always there. log_normalizer: (n,). context_embedding: (n, d).
    """

    rows: dict[str, EvaluationRows]
    log_normalizer: Tensor
    context_embedding: Tensor


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

    def __getstate__(self) -> dict[str, Any]:
        """What another process scores with: the items are embedded, so their tower stays here."""
        policy = copy.copy(self.policy)
        policy._modules = {**policy._modules, "item_tower": nn.Identity()}
        return {**self.__dict__, "policy": policy}

    def score(self, rows: EncodedRows, reward: RewardTerms | None = None) -> EvaluationRows:
        """Weights, rewards and reward-model terms of a batch of logged rows.

        Args:
            rows: n rows.
            reward: q of these rows and all items, for DM and DR; None leaves those columns out.
        """
        return self.score_models(rows, {} if reward is None else {"": reward}).rows[""]

    @torch.no_grad()
    def score_models(
        self,
        rows: EncodedRows,
        exact: Mapping[str, RewardTerms],
        *,
        at_draws: Mapping[str, RewardTerms] | None = None,
        pairs: Mapping[str, tuple[PairRewardModel, EncodedRows]] | None = None,
        draws: int = 0,
        generator: torch.Generator | None = None,
    ) -> Scored:
        """The same for several reward models at once.

        Args:
            rows: n rows.
            exact: q by model name, summed over the catalogue. Each but the first costs a pass more.
            at_draws: q by model name, averaged over items drawn from the policy.
            pairs: models over pairs with these rows in their own encoding, at the same draws.
            draws: items drawn for each row, for the latter two. generator: of the draws.

        Raises:
            DataError: the rows have no propensities.
        """
        if rows.pscore is None:
            raise DataError(
                "off-policy evaluation needs the logged propensities: "
                "name their column as 'pscore' in the log's schema"
            )
        self.policy.eval()
        device = self.policy.device
        context = self.policy.embed_contexts(to_tensors(rows.context, device))
        action = tensor_of(rows.action, device)
        waiting = list(exact.items())
        first = waiting.pop(0) if waiting else None
        reward = None if first is None else first[1]
        if at_draws or pairs:
            assert draws > 0 and generator is not None, "draws need a number and a generator"
            terms, drawn = terms_and_draws(
                context,
                self.items,
                action,
                draws=draws,
                generator=generator,
                temperature=self.policy.temperature,
                reward_model=reward,
            )
        else:
            terms = self.policy.terms(context, self.items, action, reward_model=reward)
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if first is not None:
            found[first[0]] = _both(terms)
        for name, one in waiting:
            found[name] = _both(self.policy.terms(context, self.items, action, reward_model=one))
        for name, one in (at_draws or {}).items():
            logged = rewards_at(one, action[:, None])[:, 0].double().cpu().numpy()
            found[name] = logged, rewards_at(one, drawn).double().mean(dim=1).cpu().numpy()
        for name, (model, seen) in (pairs or {}).items():
            found[name] = model.logged(seen), model.at(seen, drawn.cpu().numpy()).mean(axis=1)
        self.policy.train(self._training)
        plain = weighted_rows(rows, terms.log_prob)
        made = {
            name: replace(plain, action_reward=logged, expected_reward=expected)
            for name, (logged, expected) in found.items()
        }
        return Scored({"": plain, **made}, terms.log_normalizer, context)


def weighted_rows(rows: EncodedRows, log_prob: Tensor) -> EvaluationRows:
    """Logged rows with their importance weights under a policy that gives them `log_prob` (n,)."""
    assert rows.pscore is not None, "callers check that the log has propensities"
    log_weight = log_prob.double().cpu().numpy() - np.log(rows.pscore)
    return EvaluationRows(
        importance_weight=np.exp(log_weight),
        reward=rows.reward.astype(np.float64),
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


def _both(terms: PolicyTerms) -> tuple[np.ndarray, np.ndarray]:
    assert terms.action_reward is not None and terms.expected_reward is not None
    logged, expected = terms.action_reward.double(), terms.expected_reward.double()
    return logged.cpu().numpy(), expected.cpu().numpy()
