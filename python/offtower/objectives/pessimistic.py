"""Pessimistic objectives: an estimate of the value minus a multiple of its deviation."""

from __future__ import annotations

from torch import Tensor

from offtower.objectives.base import LoggedRows, Objective, ObjectiveValue, Reduction, not_negative


class _VariancePenalised(Objective):
    """Maximise mean_i c_i - penalty std_i(c_i) over the rows of the step."""

    def __init__(self, penalty: float = 0.1) -> None:
        self.penalty = not_negative("penalty", penalty)

    def contribution(self, rows: LoggedRows) -> Tensor:
        raise NotImplementedError

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        contribution = self.contribution(rows)
        mean = over.average(contribution)
        deviation = contribution.detach() - mean
        spread = over.average(deviation.square()).sqrt().clamp_min(1e-12)
        # The gradient of mean - penalty std is that of the mean with these weights on the rows.
        emphasis = 1.0 - self.penalty * deviation / spread
        loss = -over.mean(emphasis * contribution)
        return ObjectiveValue(loss, mean)


class PessimisticIPS(_VariancePenalised):
    r"""Counterfactual risk minimisation: mean_i w_i r_i - penalty std_i(w_i r_i).

    Gradient: mean_i [ 1 - penalty (c_i - mean c) / std c ] w_i r_i grad log pi(a_i|x_i), with
    c_i = w_i r_i; sums span all workers. A bound of the form mean - z std / sqrt(n) over a log of n
    rows is penalty = z / sqrt(n). The value reported is the mean.
    Source: Swaminathan and Joachims 2015, "Counterfactual risk minimization" (ICML), equation 6.
    """

    name = "pessimistic_ips"

    def contribution(self, rows: LoggedRows) -> Tensor:
        return rows.weight() * rows.reward


class PessimisticDR(_VariancePenalised):
    r"""As `PessimisticIPS`, with the doubly robust c_i = w_i (r_i - q_i) + m_i.

    Gradient: mean_i [ 1 - penalty (c_i - mean c) / std c ] grad c_i.
    Source: Swaminathan and Joachims 2015; Dudik et al. 2014.
    """

    name = "pessimistic_dr"
    needs_reward_model = True

    def contribution(self, rows: LoggedRows) -> Tensor:
        return rows.weight() * rows.residual() + rows.expected_reward()
