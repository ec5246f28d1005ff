"""Milliseconds per call of the operators over eligible items, beside those over all items."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offtower import ops
from offtower.benchmarks import Settings
from offtower.benchmarks.operators import CELLS, Call, Operands
from offtower.ops import Eligibility, ItemLists
from offtower.ops.eligibility import WORD

GROUPS = 64
LISTED = 200
"""Candidates, or excluded items, of each row."""
BEST = 100


def run(settings: Settings) -> dict[str, Any]:
    """Measure every form at every catalogue size, interleaved."""
    results: list[dict[str, Any]] = []
    settings.say(
        f"milliseconds per call, {settings.batch} rows, d = {settings.dim}, {GROUPS} groups, "
        f"{torch.get_num_threads()} threads; x is times that over all items"
    )
    for items in settings.items:
        x = Operands(settings.batch, items, settings.dim)
        sets = {"all items": None, **restrictions(x.action, items)}
        calls = max(2, min(settings.steps, int(CELLS / (settings.batch * items))))
        for what in ("log_prob", "with gradient", f"best {BEST}"):
            times: dict[str, list[float]] = {name: [] for name in sets}
            for turn in range(calls + 1):
                for name, eligible in sets.items():
                    x.u.grad = x.v.grad = None
                    began = time.perf_counter()
                    of(x, eligible)[what]()
                    # The first call of each warms up.
                    if turn:
                        times[name].append(time.perf_counter() - began)
            medians = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
            for name, median in medians.items():
                ratio = median / medians["all items"]
                settings.say(f"{items:>12,}  {what:<16}{name:<34}{median:12,.2f}{ratio:9.3f} x")
                results.append(
                    {"items": items, "terms": what, "sets": name, "ms": median, "times": ratio}
                )
    return {
        "suite": "eligible",
        "batch": settings.batch,
        "dim": settings.dim,
        "groups": GROUPS,
        "listed": LISTED,
        "threads": torch.get_num_threads(),
        "results": results,
    }


def of(x: Operands, eligible: Eligibility | None) -> Mapping[str, Call]:
    """Return the three measured calls."""

    def forward() -> None:
        with torch.no_grad():
            ops.policy_terms(x.u, x.v, x.action, eligible=eligible)

    return {
        "log_prob": forward,
        "with gradient": lambda: (
            ops.policy_terms(x.u, x.v, x.action, eligible=eligible).log_prob.mean().backward()
        ),
        f"best {BEST}": lambda: ops.top_k(
            x.u.detach(), x.v.detach(), min(BEST, len(x.v)), eligible=eligible
        ),
    }


def restrictions(action: Tensor, items: int) -> dict[str, Eligibility]:
    """Sets of every form that hold the rows' actions (B,)."""
    g = torch.Generator().manual_seed(1)
    rows = len(action)
    group = torch.randint(0, GROUPS, (rows,), generator=g, dtype=torch.int32)
    words = -(-items // WORD)
    half = torch.randint(-(2**63), 2**63 - 1, (GROUPS, words), generator=g)
    ranges = torch.zeros(GROUPS, words, dtype=torch.int64)
    for i in range(GROUPS):
        ranges[i, words * i // GROUPS : words * (i + 1) // GROUPS] = -1
    lists = [
        torch.cat([torch.randint(0, items, (LISTED - 1,), generator=g), action[i : i + 1]]).unique()
        for i in range(rows)
    ]
    without = [found[found != action[i]] for i, found in enumerate(lists)]
    return {
        "groups of half the items": Eligibility(group, _holding(half, group, action, items)),
        "groups of ranges of items": Eligibility(group, _holding(ranges, group, action, items)),
        f"{LISTED - 1} excluded items a row": Eligibility(excluded=_lists(without)),
        f"{LISTED} candidates a row": Eligibility(candidates=_lists(lists)),
    }


def _holding(bitmap: Tensor, group: Tensor, action: Tensor, items: int) -> Tensor:
    """The bitmap with each row's action, and without bits beyond the items."""
    if items % WORD:
        bitmap[:, -1] &= (1 << items % WORD) - 1
    for row, item in zip(group.tolist(), action.tolist(), strict=True):
        bitmap[row, item // WORD] |= torch.ones((), dtype=torch.int64) << item % WORD
    return bitmap


def _lists(lists: list[Tensor]) -> ItemLists:
    length = torch.tensor([0, *map(len, lists)], dtype=torch.int64)
    return ItemLists(length.cumsum(0), torch.cat(lists))
