"""Probabilities, weights and expected rewards of slates, from single-draw log-probabilities.

A slate is drawn without replacement (Plackett-Luce) from the distribution p(a|x) of a single draw:

    pi(a_k | x, a_<k) = p_k / (1 - sum_{j<k} p_j),     p_j = p(a_j|x)

All functions take rows of whole rounds (`data.rounds.Rounds`), compute in float64 and are
differentiable in log_prob, q and m.

Where the shown items hold nearly all mass, 1 - sum_{j<k} p_j cancels. `Rest` states the mass of the
items that a round does not show; then every remaining mass is a sum of positive numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from offtower.data.rounds import Rounds as Rounds
from offtower.errors import OfftowerError

Interaction = Literal["standard", "cascade", "independent"]
"""What a reward may depend on: the whole slate; the items down to its position; its item alone."""
PscoreKind = Literal["marginal", "conditional", "slate"]

_PAD = -1e30
"""Log-probability beyond a round's last position; finite, so that no gradient is NaN."""
_LEAST_MASS = 2.0**-40
"""Least remaining mass without a `Rest`, the rounding error of a sum of probabilities."""
_SMALLEST = 1e-300
CANCELLATION = 0.5
"""Remaining mass m below which a float32 log_prob needs a `Rest`: an error e of log_prob, 5e-6 at
logits of 60, becomes e (1 - m) / m in the log of the mass."""
MAX_MARGINAL_WORK = 2e7
"""Ordered prefixes times items that an enumeration of marginals visits for a context, at most."""
MARGINAL_DRAWS = 64
"""Draws of the items above a position, where they are too many to enumerate."""
MAX_SAMPLED_ITEMS = 100_000
"""Items of a catalogue from which they are drawn, at most."""


@dataclass(frozen=True)
class Rest:
    """The items that a round does not show.

    log_mass: (R,) log of their probability in a single draw.
    expected_reward: (R,) mean of q over them under p; None without a reward model.
    """

    log_mass: Tensor
    expected_reward: Tensor | None = None


def padded(values: Tensor, rounds: Rounds, fill: float | int = 0) -> Tensor:
    """(n,) -> (R, K) with K the longest round; `fill` beyond the last position."""
    out = values.new_full((len(rounds), rounds.longest), fill)
    return out.index_put(_index(rounds, values), values)


def unpadded(values: Tensor, rounds: Rounds) -> Tensor:
    """(R, K) -> (n,)."""
    return values[_index(rounds, values)]


def conditional_log_prob(log_prob: Tensor, rounds: Rounds, rest: Rest | None = None) -> Tensor:
    """log pi(a_k|x, a_<k) of each row.

    Args:
        log_prob: (n,) log p(a_k|x) of a single draw.
        rounds: of the n rows. rest: of the rounds; None subtracts from 1.

    Returns:
        (n,) float64.
    """
    prob = log_prob.double()
    return prob - remaining_log_mass(prob, rounds, rest)


def remaining_log_mass(log_prob: Tensor, rounds: Rounds, rest: Rest | None = None) -> Tensor:
    """log(1 - sum_{j<k} p_j) of each row: (n,) float64; arguments as `conditional_log_prob`.

    With a `rest` it is the log of the later items' and the rest's mass. Without one it is at least
    that of the row's own and the later items, which rounding of log_prob may put above 1 minus the
    earlier ones: a conditional probability is never above 1.
    """
    grid = padded(log_prob.double(), rounds, _PAD)
    if rest is None:
        mass = grid.exp()
        earlier, later = _before(mass), mass.flip(1).cumsum(1).flip(1)
        left = torch.log1p(-earlier.clamp(max=1.0 - _LEAST_MASS))
        shown = later.clamp_min(_SMALLEST).log()
        return unpadded(torch.where(1.0 - earlier < later, shown, left), rounds)
    mass = rest.log_mass.double()
    columns = []
    for k in reversed(range(grid.shape[1])):
        mass = torch.logaddexp(mass, grid[:, k])
        columns.append(mass)
    return unpadded(torch.stack(columns[::-1], dim=1), rounds)


def remaining_expected_reward(
    log_prob: Tensor,
    expected_reward: Tensor,
    action_reward: Tensor,
    rounds: Rounds,
    rest: Rest | None = None,
) -> Tensor:
    """E[q|x, a_<k] = (m - sum_{j<k} p_j q_j) / (1 - sum_{j<k} p_j) of each row.

    Args:
        log_prob, action_reward: (n,) log p(a_k|x) and q(x, a_k).
        expected_reward: (R,) m = sum_a p(a|x) q(x, a).
        rounds, rest: as in `conditional_log_prob`; a rest with its expected reward replaces m.

    Returns:
        (n,) float64.
    """
    log_prob = log_prob.double()
    product = padded(log_prob.exp() * action_reward.double(), rounds)
    log_mass = remaining_log_mass(log_prob, rounds, rest)
    if rest is None:
        left = expected_reward.double()[:, None] - _before(product)
    else:
        assert rest.expected_reward is not None, "the rest needs the mean of q over it"
        # A rest without mass may have no mean.
        mass = rest.log_mass.double().exp()
        outside = torch.where(mass > 0.0, mass * rest.expected_reward.double(), 0.0)
        later = product.flip(1).cumsum(1).flip(1)
        left = later + outside[:, None]
    return unpadded(left, rounds) * torch.exp(-log_mass)


def prefix_sum(values: Tensor, rounds: Rounds) -> Tensor:
    """Sum over a row's position and the earlier ones: (n,) -> (n,)."""
    return unpadded(padded(values, rounds).cumsum(1), rounds)


def earlier_sum(values: Tensor, rounds: Rounds) -> Tensor:
    """Sum over the earlier positions of a round: (n,) -> (n,), 0 at position 0."""
    return unpadded(_before(padded(values, rounds)), rounds)


def round_sum(values: Tensor, rounds: Rounds) -> Tensor:
    """Sum over the whole round, in each of its rows: (n,) -> (n,)."""
    number = torch.from_numpy(rounds.number).to(values.device)
    return values.new_zeros(len(rounds)).index_add(0, number, values)[number]


@dataclass(frozen=True)
class SlateWeights:
    """Logs of a policy's importance weights on the n rows of whole rounds.

    item: rho_k = pi(a_k|x,a_<k) / pi_0(a_k|x,a_<k); None where only the slate's pscore is known.
    cascade: prod_{j<=k} rho_j; None likewise. earlier: prod_{j<k} rho_j, 1 at position 0.
    slate: prod_j rho_j, the same in each row of a round.
    """

    item: Tensor | None
    cascade: Tensor | None
    earlier: Tensor | None
    slate: Tensor

    def of(self, interaction: Interaction) -> Tensor:
        """(n,) logs of the weights of an estimator or objective.

        Raises:
            OfftowerError: the pscores do not permit the interaction.
        """
        if interaction == "standard":
            return self.slate
        if interaction == "cascade" and self.cascade is not None:
            return self.cascade
        if interaction == "cascade":
            raise OfftowerError(
                "pscores of whole slates (pscore_kind: slate) permit the interaction 'standard' "
                "only; log the conditional probability of each position for 'cascade'"
            )
        raise OfftowerError(
            "the interaction 'independent' needs each position's marginal probabilities "
            "(pscore_kind: marginal)"
        )


def slate_weights(
    conditional: Tensor, log_pscore: Tensor, rounds: Rounds, kind: PscoreKind
) -> SlateWeights:
    """Weights of a slate policy.

    Args:
        conditional: (n,) log pi(a_k|x, a_<k).
        log_pscore: (n,) log of the logged propensities. kind: what they are, conditional or slate.
        rounds: of the n rows.
    """
    if kind == "slate":
        return SlateWeights(None, None, None, round_sum(conditional, rounds) - log_pscore)
    item = conditional - log_pscore
    return SlateWeights(
        item, prefix_sum(item, rounds), earlier_sum(item, rounds), round_sum(item, rounds)
    )


def position_marginals(log_prob: Tensor, position: int) -> Tensor:
    """P(a_k = a | x) of every item under Plackett-Luce, by enumeration of the earlier items.

    Args:
        log_prob: (R, N) log p(a|x) of a single draw.
        position: k, from 0.

    Returns:
        (R, N) float64.

    Raises:
        OfftowerError: too many orders of earlier items to enumerate.
    """
    prob = log_prob.double().exp()
    items = prob.shape[1]
    if position == 0:
        return prob
    if position == 1:
        ratio = prob / (1.0 - prob).clamp(min=_LEAST_MASS)
        return prob * (ratio.sum(1, keepdim=True) - ratio)
    check_marginals(items, position)
    total = torch.zeros_like(prob)
    for prefix in permutations(range(items), position):
        chain, mass = torch.ones_like(prob[:, 0]), torch.ones_like(prob[:, 0])
        for item in prefix:
            chain = chain * prob[:, item] / mass.clamp(min=_LEAST_MASS)
            mass = mass - prob[:, item]
        rest = prob.clone()
        rest[:, list(prefix)] = 0.0
        total += rest * (chain / mass.clamp(min=_LEAST_MASS))[:, None]
    return total


def sampled_marginals(
    log_prob: Tensor, action: Tensor, position: int, generator: torch.Generator
) -> Tensor:
    """Unbiased estimates of P(a_k = a | x) of one item a row, over drawn items above it.

    P(a_k = a | x) = E[1{a is not above} p_a / (1 - sum_{j<k} p_j)], a mean over MARGINAL_DRAWS
    draws of the k items above, independent between rows. So importance weights stay unbiased, and
    the standard error of an estimate from many rows contains the error of the draws.

    Args:
        log_prob: (R, N) log p(a|x) of a single draw.
        action: (R,). position: k, from 1. generator: of the draws, on the CPU.

    Returns:
        (R,) float64.

    Raises:
        OfftowerError: the catalogue is too large.
    """
    items = log_prob.shape[1]
    if items > MAX_SAMPLED_ITEMS:
        raise OfftowerError(
            f"the marginal probability of an item at position {position} would need draws of the "
            f"items above it from {items:,} items, above the limit of {MAX_SAMPLED_ITEMS:,}. Log "
            "the conditional probability of each position (pscore_kind: conditional), or evaluate "
            "the rows of positions 0 and 1 alone"
        )
    log_prob = log_prob.double()
    own = log_prob.gather(1, action[:, None]).exp()[:, 0]
    total = torch.zeros_like(own)
    for _ in range(MARGINAL_DRAWS):
        uniform = torch.rand(log_prob.shape, dtype=torch.float64, generator=generator)
        key = log_prob - (-uniform.clamp_min(1e-300).log()).log().to(log_prob.device)
        above = key.topk(position, dim=1).indices
        left = 1.0 - log_prob.gather(1, above).exp().sum(1)
        there = (above == action[:, None]).any(1)
        total += torch.where(there, 0.0, own / left.clamp_min(_LEAST_MASS))
    return total / MARGINAL_DRAWS


def enumerable(items: int, position: int) -> bool:
    """Whether marginals of a position are summed over all orders of the items above it."""
    prefixes = float(np.prod([float(items - j) for j in range(position)]))
    return position <= 1 or prefixes * items <= MAX_MARGINAL_WORK


def check_marginals(items: int, position: int) -> None:
    """Refuse marginals of too many orders to enumerate.

    Raises:
        OfftowerError: as `position_marginals`.
    """
    if not enumerable(items, position):
        prefixes = float(np.prod([float(items - j) for j in range(position)]))
        raise OfftowerError(
            f"the marginal probability of an item at position {position} sums over {prefixes:.3g} "
            f"orders of the items above it, for {items:,} items: too many to enumerate. Log the "
            "conditional probability of each position (pscore_kind: conditional), or evaluate the "
            "rows of positions 0 and 1 alone"
        )


def _index(rounds: Rounds, like: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.from_numpy(rounds.number).to(like.device),
        torch.from_numpy(rounds.position).to(like.device),
    )


def _before(values: Tensor) -> Tensor:
    """(R, K) exclusive cumulative sums along positions."""
    ends = values.cumsum(1)
    return torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=1)
