"""Probabilities of a served policy from a dense matrix of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offtower.config import ServingConfig


def served_probabilities(logits: Tensor, serving: ServingConfig) -> Tensor:
    """(B, N) probabilities of the served policy, from the trained one's logits (B, N).

    For small catalogues. Items that are not eligible have logits of -inf. In mode top_k the best
    item has probability 1.
    """
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
