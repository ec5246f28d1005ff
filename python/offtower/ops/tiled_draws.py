"""Draws from softmax distributions by inversion on two levels: a tile of items, then an item of it.

This is the meaning of the native kernel of csrc/cpu/kernels/draw.h: the same seed gives the same
items, up to the rounding of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from offtower.ops.philox import uniform_pairs
from offtower.ops.types import finite_top

TILE_UNIT = 192
"""Items of a tile are a multiple: whole words of a bitmap, and whole folds of the kernel's sums."""
WITH_REPLACEMENT, ONE_BY_ONE = 0, 1
"""Purposes of random numbers."""


@dataclass(frozen=True)
class DrawSettings:
    """How many items are drawn for each row, and from which random numbers."""

    num_samples: int
    replacement: bool
    seed: int
    """Of all rows; 64 bits."""
    stream: Tensor
    """(B,) int64 numbers of the rows, which tell their random numbers apart."""

    def take(self, row: Tensor | slice) -> DrawSettings:
        """The settings of some rows."""
        return replace(self, stream=self.stream[row])


class SoftmaxDraws(NamedTuple):
    """Drawn items, and the normalizer of the distribution that they were drawn from."""

    item: Tensor
    """(B, s) int64; -1 where a row has no further item of positive probability."""
    log_prob: Tensor
    """(B, s) of a single draw, float32 (float64 for float64 operands); -inf where there is none."""
    reference_max: Tensor
    """(B,) near the largest logit."""
    total: Tensor
    """(B,) sum_a exp(s_a - reference_max); NaN where a logit is NaN or inf."""

    @property
    def log_normalizer(self) -> Tensor:
        """(B,) float64 log sum_a exp s_a."""
        return self.reference_max.double() + self.total.double().log()

    def map(self, change: Callable[[Tensor], Tensor]) -> SoftmaxDraws:
        """The same draws with every tensor changed."""
        return SoftmaxDraws(*(change(value) for value in self))


def tile_items(items: int) -> int:
    """Items of a tile of a catalogue: about sqrt(N), so that draws cost little beside one pass."""
    return TILE_UNIT * max(1, round(math.sqrt(items) / (2 * TILE_UNIT)))


def draw_rows(logit: Tensor, tile: int, settings: DrawSettings) -> SoftmaxDraws:
    """Draw items from the softmax of each row of logits (B, N); -inf is never drawn.

    Without replacement the items have the Plackett-Luce distribution: independent draws without
    their repeats, then the missing ones one by one.
    """
    tiles = _Tiles(logit, tile)
    draw = torch.arange(settings.num_samples, dtype=torch.int64, device=logit.device)
    point = uniform_pairs(settings.seed, settings.stream[:, None], draw, WITH_REPLACEMENT)
    item = tiles.draw(*point)
    if not settings.replacement:
        item = _completed(logit, tile, _distinct(item), settings)
    score = logit.gather(1, item.clamp_min(0)) - finite_top(tiles.top)[:, None]
    log_prob = (score - tiles.total.log()[:, None].to(score.dtype)).masked_fill(
        item < 0, float("-inf")
    )
    return SoftmaxDraws(item, log_prob, tiles.top, tiles.total)


class _Tiles:
    """Masses of the tiles of each row, in float64.

    Args:
        logit: (B, N).
        tile: items of a tile.
    """

    def __init__(self, logit: Tensor, tile: int) -> None:
        self.items = logit.shape[1]
        padded = torch.nn.functional.pad(logit, (0, -self.items % tile), value=float("-inf"))
        self._logit = padded.view(len(logit), -1, tile)
        self._top = self._logit.amax(2)
        inside = (self._logit - finite_top(self._top)[:, :, None]).exp().sum(2)
        self.top = self._top.amax(1)
        """(B,) largest logit."""
        factor = (self._top - finite_top(self.top)[:, None]).double().exp()
        self._cumulative = (inside.double() * factor).cumsum(1)
        self.total = self._cumulative[:, -1]
        """(B,) float64."""

    def draw(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, s) items at uniform numbers (B, s) for the tile and inside it; -1 for none."""
        tile = _inverted(self._cumulative, first)
        chosen = self._logit.gather(1, tile[:, :, None].expand(-1, -1, self._logit.shape[2]))
        top = finite_top(self._top.gather(1, tile))[:, :, None]
        cumulative = (chosen - top).exp().double().cumsum(2)
        inside = _inverted(cumulative.flatten(0, 1), second.reshape(-1, 1)).view(tile.shape)
        possible = (self.total > 0.0) & self.total.isfinite()
        return (tile * self._logit.shape[2] + inside).masked_fill(~possible[:, None], -1)


def _inverted(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """(n, s) int64 categories with cumulative masses (n, K) at uniform numbers (n, s)."""
    total = cumulative[:, -1:].contiguous()
    drawn = torch.searchsorted(cumulative, uniform * total, right=True)
    # Rounding may put a point at the total: then the last category that has a mass is drawn.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(drawn, last).clamp_max(cumulative.shape[1] - 1)


def _distinct(item: Tensor) -> Tensor:
    """(B, s) the distinct items of each row in their order, then -1."""
    ordered, order = torch.sort(item, dim=1, stable=True)
    repeated = torch.zeros_like(item, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    repeated = torch.zeros_like(repeated).scatter(1, order, repeated)
    kept = torch.argsort(repeated, dim=1, stable=True)
    return item.masked_fill(repeated, -1).gather(1, kept)


def _completed(logit: Tensor, tile: int, item: Tensor, settings: DrawSettings) -> Tensor:
    """Items (B, s) with those of -1 at each row's end drawn, if its items have any mass left."""
    item = item.clone()
    possible = item[:, 0] >= 0
    for draw in range(1, settings.num_samples):
        row = ((item[:, draw] < 0) & possible).nonzero()[:, 0]
        if not len(row):
            continue
        there = item[row, :draw]
        # No -1 is among the items before: they fill up in their order.
        rest = logit[row].scatter(1, there, float("-inf"))
        number = torch.full_like(row, draw)
        first, second = uniform_pairs(settings.seed, settings.stream[row], number, ONE_BY_ONE)
        found = _Tiles(rest, tile).draw(first[:, None], second[:, None])[:, 0]
        item[row, draw] = found
        possible[row] = found >= 0
    return item
