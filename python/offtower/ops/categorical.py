"""Draws from categorical distributions given as log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_categorical(
    log_mass: Tensor, num_samples: int, generator: torch.Generator | None
) -> Tensor:
    """Draw (n, s) int64 categories with replacement, by inversion of the cumulative sum in float64.

    Args:
        log_mass: (n, K), up to a constant a row, at most about 700; -inf is never drawn.
    """
    cumulative = torch.cumsum(log_mass.double().exp(), 1)
    device = log_mass.device if generator is None else generator.device
    uniform = torch.rand(
        len(log_mass), num_samples, dtype=torch.float64, generator=generator, device=device
    ).to(log_mass.device)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    # Rounding may put a draw at the total, beyond the last category of positive probability.
    last = (log_mass > float("-inf")).double().cumsum(1).argmax(1)
    return torch.minimum(drawn, last[:, None])
