"""Draws from categorical distributions given by logarithms."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_categorical(
    log_mass: Tensor, num_samples: int, generator: torch.Generator | None
) -> Tensor:
    """(n, s) int64 draws with replacement by inversion of the cumulative mass, in float64.

    Args:
        log_mass: (n, K), up to a constant a row, at most about 700; -inf is never drawn.
    """
    cumulative = torch.cumsum(log_mass.double().exp(), 1)
    device = log_mass.device if generator is None else generator.device
    uniform = torch.rand(
        len(log_mass), num_samples, dtype=torch.float64, generator=generator, device=device
    ).to(log_mass.device)
    place = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    # Rounding may put a draw at the total itself, beyond the last mass that is not 0.
    last = (log_mass > float("-inf")).double().cumsum(1).argmax(1)
    return torch.minimum(place, last[:, None])
