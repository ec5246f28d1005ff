"""Objectives over slates: the per-row terms of whole rounds in the place of single draws.

With cascade weights the value of a round is sum_k w_{1:k} r_k, w_{1:k} = pi(a_1..a_k|x) /
pi_0(a_1..a_k|x), whose gradient is

    sum_k w_{1:k} r_k grad log pi(a_1..a_k|x)
        = sum_j grad log pi(a_j|x, a_<j) sum_{k>=j} w_{1:k} r_k

So an objective over rows of (log pi, pi_0, r) is one over slates when log pi and pi_0 are those of
the items down to the row's position; with `standard`, of the whole slate. The gradient passes
through p_j and through the sum in pi(a_k|x, a_<k) = p_k / (1 - sum_{j<k} p_j).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from offtower.errors import ConfigError
from offtower.objectives.base import (
    EarlierPositions,
    JointPositions,
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    provided,
)
from offtower.slates import (
    Interaction,
    PscoreKind,
    conditional_log_prob,
    earlier_sum,
    prefix_sum,
    remaining_expected_reward,
    round_sum,
)


class SlateObjective(Objective):
    """An objective over the rounds of a log of slates.

    Sources: McInerney et al. 2020 (KDD) for the cascade weights; Kiyohara et al. 2022 (WSDM) for
    doubly robust ones, with the expected reward of a position under the policy given the items
    above it.

    Args:
        objective: over single draws.
        kind: what the log's pscore is.
        interaction: "cascade", or "standard"; "auto" is cascade for conditional pscores.

    Raises:
        ConfigError: the objective has no form for slates, or the pscores do not permit the
            interaction.
    """

    def __init__(self, objective: Objective, kind: PscoreKind, interaction: str = "auto") -> None:
        self.objective = objective
        self.name = objective.name
        self.requirements = replace(objective.requirements, rewarded_rows_only=False)
        self.kind: PscoreKind = kind
        if interaction == "auto":
            interaction = "standard" if kind == "slate" else "cascade"
        if interaction == "cascade" and kind == "slate":
            raise ConfigError(
                "objective.interaction=cascade needs the conditional probability of each position; "
                "pscores of whole slates (pscore_kind: slate) permit standard only"
            )
        self.interaction: Interaction = "standard" if interaction == "standard" else "cascade"
        form = objective.requirements.slates
        if form is None:
            raise ConfigError(
                f"objective '{objective.name}' has no form for slates: choose ips, clipped_ips, "
                "snips, dr, clipped_dr or weighted_likelihood, or train on the rows of position 0"
            )
        if kind == "slate" and objective.requirements.reward_model:
            raise ConfigError(
                f"objective '{objective.name}' corrects each position by its conditional weight, "
                "which pscores of whole slates (pscore_kind: slate) do not give: choose ips, "
                "clipped_ips or snips"
            )

    def for_rewards(self, *, binary: bool) -> Objective:
        return SlateObjective(
            self.objective.for_rewards(binary=binary), self.kind, self.interaction
        )

    def above(self, lowest_reward: float) -> Objective:
        return SlateObjective(self.objective.above(lowest_reward), self.kind, self.interaction)

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        form = self.requirements.slates
        if form == "rows":
            return self.objective(rows, reduction)
        if form == "conditional":
            return self.objective(_conditional_rows(rows), reduction)
        return self.objective(joint_rows(rows, self.kind, self.interaction), reduction)


def joint_rows(rows: LoggedRows, kind: PscoreKind, interaction: Interaction) -> LoggedRows:
    """Rows whose log-probabilities are those of the items down to each position, or of the slate.

    rows: of whole rounds (`LoggedRows.slates`), with terms of single draws. The log-probabilities
    are float64, since products of many propensities leave the range of float32.
    """
    slates, terms = provided(rows.slates, "slates"), rows.policy_terms()
    rounds = slates.rounds
    conditional = conditional_log_prob(terms.log_prob, rounds)
    log_pscore = provided(rows.pscore, "pscore").double().log()
    joint = round_sum if interaction == "standard" else prefix_sum
    earlier, expected = None, None
    if terms.expected_reward is not None:
        first = torch.from_numpy(rounds.first).to(conditional.device)
        expected = remaining_expected_reward(
            terms.log_prob,
            terms.expected_reward[first],
            provided(terms.action_reward, "action_reward"),
            rounds,
        )
        above = earlier_sum(conditional, rounds)
        position = torch.from_numpy(rounds.position).to(conditional.device)
        log_weight = above - earlier_sum(log_pscore, rounds)
        earlier = EarlierPositions(above, log_weight, position == 0)
    logged = log_pscore if kind == "slate" else joint(log_pscore, rounds)
    action_reward = terms.action_reward
    factor = slates.examination
    if factor is not None and expected is not None and action_reward is not None:
        expected, action_reward = expected * factor, action_reward * factor
    made = replace(
        terms,
        log_prob=joint(conditional, rounds),
        expected_reward=expected,
        action_reward=action_reward,
    )
    return replace(rows, terms=made, joint=JointPositions(logged, earlier))


def _conditional_rows(rows: LoggedRows) -> LoggedRows:
    terms = rows.policy_terms()
    rounds = provided(rows.slates, "slates").rounds
    conditional: Tensor = conditional_log_prob(terms.log_prob, rounds)
    return replace(rows, terms=replace(terms, log_prob=conditional))
