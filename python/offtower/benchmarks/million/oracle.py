"""A learner that knows everything about a world but the parts of its items that ids alone show."""

from __future__ import annotations

import torch
from torch import Tensor

from offtower.benchmarks.million.world import MillionWorld
from offtower.benchmarks.peers import Unavailable

STEPS = 60
"""Iterations of L-BFGS; the gradient is then below 1e-6 of its first."""


def oracle(world: MillionWorld) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the true model class to the log: z = <c(x), t_a> + b_a with the true c.

    t_a and b_a have the prior of the world, normal around the parts that the features show. The
    posterior mode is fitted to the rewards of the logged rows; items that are not logged stay at
    the prior mean. What it cannot know, no learner of the same rows can, up to the difference
    between the mode and the posterior's mean reward.

    Returns:
        (n, l) context factors, (N, l) item factors and (N,) biases, float32.

    Raises:
        Unavailable: features determine the rewards.
    """
    hidden = world.simulated.hidden
    if hidden is None:
        raise Unavailable("features determine the rewards of this world: the optimum is its oracle")
    arrays = world.arrays
    size = torch.cat([hidden.latent_size, torch.tensor([hidden.logit_size], dtype=torch.float64)])
    logged, place = torch.unique(arrays.action, return_inverse=True)
    context = _with_one(world.simulated.context_latent(world.log.table))
    known = (context * _with(hidden.latent, hidden.logit)[arrays.action]).sum(1)
    context = context * size
    reward = arrays.reward.double()
    # Standardized, so that the prior is a unit normal.
    part = torch.zeros(len(logged), context.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([part], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logit = known + (context * part[place]).sum(1)
        found = torch.nn.functional.binary_cross_entropy_with_logits(logit, reward, reduction="sum")
        found = (found + part.square().sum() / 2) / len(reward)
        found.backward()
        return found

    optimizer.step(loss)
    fitted = _with(hidden.latent, hidden.logit).clone()
    fitted[logged] += part.detach() * size
    fresh = world.simulated.context_latent(world.contexts)
    return fresh.float(), fitted[:, :-1].float().contiguous(), fitted[:, -1].float().contiguous()


def _with(latent: Tensor, logit: Tensor) -> Tensor:
    return torch.cat([latent, logit[:, None]], 1)


def _with_one(latent: Tensor) -> Tensor:
    return torch.cat([latent, latent.new_ones(len(latent), 1)], 1)
