"""Random numbers of a tower as a function of (seed, purpose, row), not of how rows are grouped.

The stream of a generator for hidden categories and dropout would depend on the rows of each call:
on the number of workers, the chunks of the catalogue and earlier draws. Here a row's draws are a
hash of its number in the batch (contexts) or the catalogue (items). They are the same for any
number of workers, in the second pass over a chunk, and on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offtower.data.features import to_device

_GOLDEN = 0x9E3779B97F4A7C15
_ONE = 1 << 24
"""Draws are multiples of 2^-24, like float32 draws in [0, 1)."""
_LANES = 4
"""Draws of dropout from one hash, of 16 bits each; hashing is a third of the time of a layer."""


class RowDraws:
    """The draws of one tower. Without a seed they come from torch's global generator of the CPU.

    Attributes:
        seed: of the step; None draws from the global generator.
        numbers: (n,) of the rows of the current forward pass, on its device.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.numbers: Tensor | None = None

    def begin(self, numbers: Tensor | None) -> None:
        """Set the rows of the forward pass that begins."""
        self.numbers = numbers

    def below(
        self, rate: float, purpose: int, rows: int, device: torch.device, width: int = 1
    ) -> Tensor:
        """(rows, width) bool on `device`, each True with probability `rate`, rounded to a multiple
        of 2^-24 for one draw a row and of 2^-16 for more."""
        if self.seed is None:
            return to_device(
                torch.rand(rows, width, dtype=torch.float32, device="cpu") < rate, device
            )
        numbers = torch.arange(rows, device=device) if self.numbers is None else self.numbers
        return self.of(numbers, rate, purpose, width)

    def of(self, numbers: Tensor, rate: float, purpose: int, width: int = 1) -> Tensor:
        """Like `below`, for rows with the given `numbers` (k,)."""
        if self.seed is None:
            return to_device(
                torch.rand(len(numbers), width, dtype=torch.float32, device="cpu") < rate,
                numbers.device,
            )
        key = _mix(numbers + _mixed(self.seed + _GOLDEN * (purpose + 1)))[:, None]
        if width == 1:
            # Bits 39 to 62 are uniform and unaffected by the sign extension of the shift.
            return ((key >> 39) & (_ONE - 1)) < round(rate * _ONE)
        hashes = torch.arange(-(-width // _LANES), device=key.device)
        key = _mix(key + _wrapped(_GOLDEN) * hashes)
        # int16 counts from -2^15, and cannot hold the threshold of the rate 1.
        last = round(rate * (1 << 16)) - 1 - (1 << 15)
        below = key.view(torch.int16)[:, :width] <= max(last, -(1 << 15))
        return below if last >= -(1 << 15) else torch.zeros_like(below)


class RowDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) with draws keyed by row; see `RowDraws`."""

    def __init__(self, rate: float, draws: RowDraws, purpose: int) -> None:
        super().__init__()
        self.rate = rate
        self._draws, self._purpose = draws, purpose

    def forward(self, hidden: Tensor) -> Tensor:
        """Drop some of (n, ...) numbers; those of a row do not depend on where the others end."""
        if not self.training or self.rate == 0.0:
            return hidden
        rows, width = len(hidden), hidden.shape[1:].numel()
        dropped = self._draws.below(self.rate, self._purpose, rows, hidden.device, width)
        kept = dropped.view(hidden.shape).logical_not().to(hidden.dtype)
        return hidden * kept.mul_(1.0 / (1.0 - self.rate))


def _mix(value: Tensor) -> Tensor:
    """The finalizer of splitmix64 on int64, whose products wrap like unsigned ones.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    value = (value ^ _shifted(value, 30)) * _wrapped(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _wrapped(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical right shift."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(value: int) -> int:
    return int(_mix(torch.tensor([_wrapped(value)], dtype=torch.int64, device="cpu"))[0])


def _wrapped(value: int) -> int:
    """The int64 with the same lower 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
