"""Logged rows, and rounds of slates, with their importance weights under a policy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from offtower.data.rounds import Rounds
from offtower.data.rows import EncodedRows
from offtower.evaluation.rows import EvaluationRows
from offtower.slates import conditional_log_prob, slate_weights


def context_rows(rows: EncodedRows) -> EncodedRows:
    """The rows whose contexts a policy and a reward model read: the first of each round."""
    rounds = rows.rounds
    return rows if rounds is None else replace(rows.take(rounds.first), pscore_kind=None)


def slate_rows(rows: EncodedRows, rounds: Rounds, conditional: Tensor) -> EvaluationRows:
    """Whole rounds with their weights under a policy of log pi(a_k|x, a_<k) `conditional` (n,)."""
    assert rows.pscore is not None and rows.pscore_kind is not None
    log_pscore = torch.from_numpy(np.log(rows.pscore))
    weights = slate_weights(conditional.cpu(), log_pscore, rounds, rows.pscore_kind)
    log_weight = weights.slate if weights.cascade is None else weights.cascade
    return EvaluationRows(
        importance_weight=np.exp(log_weight.numpy()),
        reward=rows.reward.astype(np.float64),
        user=None if rows.user_id is None else rows.user_id.view(np.int64),
        row=rows.row,
        log_weight=log_weight.numpy(),
        round=np.repeat(rows.row[rounds.first], rounds.lengths),
        earlier_weight=None if weights.earlier is None else np.exp(weights.earlier.numpy()),
        slate_weight=np.exp(weights.slate.numpy()),
        rewards=rows.rewards,
    )


def weighted_rows(rows: EncodedRows, log_prob: Tensor) -> EvaluationRows:
    """Logged rows with their importance weights under a policy that gives them `log_prob` (n,).

    Rows of one round are correlated: without users, intervals are clustered by round.
    """
    assert rows.pscore is not None, "callers check that the log has propensities"
    if rows.rounds is not None:
        conditional = conditional_log_prob(log_prob.cpu(), rows.rounds)
        return slate_rows(rows, rows.rounds, conditional)
    cluster = rows.round_id if rows.user_id is None else rows.user_id
    log_weight = log_prob.double().cpu().numpy() - np.log(rows.pscore)
    return EvaluationRows(
        importance_weight=np.exp(log_weight),
        reward=rows.reward.astype(np.float64),
        user=None if cluster is None else cluster.view(np.int64),
        row=rows.row,
        log_weight=log_weight,
        row_weight=rows.row_weight,
        rewards=rows.rewards,
    )
