"""Random sets of eligible items, as operators take them and as dense masks."""

from __future__ import annotations

import torch
from torch import Tensor

from offtower.ops import Eligibility, ItemLists

FORMS = ("bitmap", "excluded", "candidates", "bitmap excluded", "bitmap excluded candidates")


def item_lists(mask: Tensor) -> ItemLists:
    """The items of each row of a (B, N) mask."""
    offsets = torch.zeros(len(mask) + 1, dtype=torch.int64)
    torch.cumsum(mask.sum(1), 0, out=offsets[1:])
    return ItemLists(offsets, mask.nonzero()[:, 1].contiguous())


def packed(mask: Tensor) -> Tensor:
    """(G, ceil(N / 64)) int64 words of a (G, N) mask."""
    groups, items = mask.shape
    padded = torch.zeros(groups, -(-items // 64) * 64, dtype=torch.bool)
    padded[:, :items] = mask
    bit = torch.ones(64, dtype=torch.int64) << torch.arange(64)
    return (padded.view(groups, -1, 64) * bit).sum(2)


def draw_eligible(
    action: Tensor, items: int, forms: str, generator: torch.Generator, density: float = 0.5
) -> tuple[Eligibility, Tensor]:
    """Sets that hold each row's action, and the (B, N) mask of them.

    Groups have different densities: nearly nothing, ranges of whole words, everything.
    """
    rows = len(action)
    mask = torch.ones(rows, items, dtype=torch.bool)
    parts: dict[str, object] = {}
    own = torch.zeros(rows, items, dtype=torch.bool)
    own[torch.arange(rows), action] = True
    if "bitmap" in forms:
        count = max(1, min(rows, 5))
        group = torch.randint(0, count, (rows,), generator=generator, dtype=torch.int32)
        of_group = torch.rand(count, items, generator=generator) < density
        of_group[0] = True
        if count > 1:
            of_group[1, items // 3 :] = False
        if count > 2:
            of_group[2] = False
        of_group.index_put_((group.long(), action), torch.tensor(True))
        parts |= {"group": group, "bitmap": packed(of_group)}
        mask &= of_group[group.long()]
    if "excluded" in forms:
        out = (torch.rand(rows, items, generator=generator) < 0.2) & ~own
        out[rows // 2] = False
        parts["excluded"] = item_lists(out)
        mask &= ~out
    if "candidates" in forms:
        some = (torch.rand(rows, items, generator=generator) < density / 2) | own
        some[0] = own[0]
        parts["candidates"] = item_lists(some)
        mask &= some
    return Eligibility(**parts), mask  # type: ignore[arg-type]
