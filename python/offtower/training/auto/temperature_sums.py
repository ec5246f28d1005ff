"""Sums over items of one candidate's softmax policies at several inverse temperatures.

All temperatures share the logits, and, where each is twice the one before, the exponentials:
exp(2 s l) = exp(s l)^2. Items come in chunks, so that no (rows, items) array is held.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


class TemperatureSums:
    """Normalizers and expected rewards of B rows at T inverse temperatures.

    Args:
        rows: B.
        inverse_temperatures: ascending.
        rewards: whether there is a reward model.
    """

    def __init__(
        self,
        rows: int,
        inverse_temperatures: Sequence[float],
        device: torch.device,
        *,
        rewards: bool,
    ) -> None:
        self.inverse_temperatures = tuple(inverse_temperatures)
        self._scales = torch.tensor(inverse_temperatures, dtype=torch.float64, device=device)
        shape = (len(inverse_temperatures), rows)
        # Doubling is exact, so repeated squaring is chosen where it is meant.
        pairs = itertools.pairwise(inverse_temperatures)
        self._doubles = [False, *(abs(b - 2.0 * a) <= 1e-9 * b for a, b in pairs)]
        self._max = torch.full((rows,), float("-inf"), device=device)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._reward = torch.zeros_like(self._sum) if rewards else None

    def add(
        self, rows: slice, logit: Tensor, reward: Tensor | None, weight: Tensor | None = None
    ) -> None:
        """Add a chunk of items.

        Args:
            rows: which rows these are.
            logit: (b, n) without temperature; -inf for items that are not eligible.
            reward: (b, n) predictions of the reward model, if there is one.
            weight: (n,) number of items that each one stands for; None is 1.
        """
        before = self._max[rows]
        top = torch.maximum(before, logit.amax(dim=1))
        reference = torch.where(top == float("-inf"), 0.0, top)
        shifted = logit - reference[:, None]
        sums: list[Tensor] = []
        rewarded: list[Tensor] = []
        part = shifted
        if reward is not None and weight is not None:
            reward = reward * weight
        for scale, doubles in zip(self.inverse_temperatures, self._doubles, strict=True):
            part = part.square_() if doubles else torch.exp(shifted * scale)
            sums.append(part.sum(dim=1) if weight is None else part @ weight)
            if reward is not None:
                rewarded.append(torch.linalg.vecdot(part, reward))
        decay = torch.exp(self._scales[:, None] * (before - reference).double())
        self._sum[:, rows] = self._sum[:, rows] * decay + torch.stack(sums).double()
        if self._reward is not None:
            self._reward[:, rows] = self._reward[:, rows] * decay + torch.stack(rewarded).double()
        self._max[rows] = top

    def log_prob(self, action_logit: Tensor) -> Tensor:
        """(T, B) log pi(a|x) of the items with logits `action_logit` (B,)."""
        difference = (action_logit - self._max).double()
        return self._scales[:, None] * difference - self._sum.log()

    def expected_reward(self) -> Tensor | None:
        """(T, B) sum_a pi(a|x) q(x, a); None without a reward model."""
        return None if self._reward is None else self._reward / self._sum
