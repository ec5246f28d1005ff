"""Probabilities of a served policy from a dense matrix of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offtower.config import ServingConfig
from offtower.errors import ConfigError


def served_probabilities(
    logits: Tensor, serving: ServingConfig, new: Tensor | None = None
) -> Tensor:
    """(B, N) probabilities of the served policy, from the trained one's logits (B, N).

    For small catalogues. Items that are not eligible have logits of -inf. In mode top_k the best
    item has probability 1.

    Args:
        new: (N,) bool, the new items, whose share `serving.new_items` limits.

    Raises:
        ConfigError: there are limits and the new items are not given.
    """
    served, limits = _unlimited(logits, serving), serving.new_items
    if limits is None:
        return served
    if new is None:
        raise ConfigError("serving.new_items needs the new items, which these logits do not tell")
    mass, rest = (served[:, kind].sum(1, keepdim=True) for kind in (new, ~new))
    share = (mass / (mass + rest)).clamp(limits.at_least, limits.at_most)
    scaled = torch.where(new, served * share / mass, served * (1.0 - share) / rest)
    return torch.where((mass <= 0.0) | (rest <= 0.0), served, scaled)


def _unlimited(logits: Tensor, serving: ServingConfig) -> Tensor:
    score, count = logits / serving.temperature, logits.shape[1]
    top = 1 if serving.mode == "top_k" else serving.top
    if top is not None and top < count:
        # Stable: ties go to the lowest number, as in `ops.top_k`.
        worse = torch.argsort(score, dim=1, descending=True, stable=True)[:, top:]
        score = score.scatter(1, worse, -math.inf)
    softmax = torch.softmax(score, dim=1)
    if serving.uniform == 0.0:
        return softmax
    eligible = torch.isfinite(logits).to(logits.dtype)
    share = eligible / eligible.sum(1, keepdim=True)
    return (1.0 - serving.uniform) * softmax + serving.uniform * share
