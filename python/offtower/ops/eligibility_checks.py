"""Checks of eligible items."""

from __future__ import annotations

import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops.eligibility import WORD, Eligibility, ItemLists


def checked_eligibility(
    eligible: Eligibility | None, rows: int, items: int | None, device: torch.device
) -> Eligibility | None:
    """Eligible items that fit B rows and N items; candidates as lists alone (`resolved`).

    Values are read on the CPU alone: elsewhere that would wait for the device.

    Args:
        items: N; None where it is not known.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit, or on the CPU a number is out of range
            or a list is not sorted.
    """
    if eligible is None:
        return None
    if not isinstance(eligible, Eligibility):
        raise OperatorError(f"eligible must be an Eligibility, not {type(eligible).__name__}")
    parts = (eligible.group, eligible.excluded, eligible.candidates)
    if (eligible.group is None) != (eligible.bitmap is None):
        raise OperatorError("eligible.group and eligible.bitmap must be given together")
    if all(part is None for part in parts):
        return None
    if eligible.group is not None and eligible.bitmap is not None:
        _check_bitmap(eligible.group, eligible.bitmap, rows, items, device)
    for name, lists in (("excluded", eligible.excluded), ("candidates", eligible.candidates)):
        if lists is not None:
            _check_lists(f"eligible.{name}", lists, rows, items, device)
    return eligible.resolved()


def check_eligible_action(eligible: Eligibility | None, action: Tensor, items: int | None) -> None:
    """Check that each row's action on the CPU is eligible; negative ones lie elsewhere."""
    if eligible is None or action.device.type != "cpu" or not action.numel():
        return
    rows = torch.arange(action.shape[0], dtype=torch.int64)
    wrong = ~eligible.contains(rows, action.clamp_min(0)) & (action >= 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        one = eligible.take(torch.tensor([row], dtype=torch.int64))
        if items is not None and not int(one.count(items)):
            raise OperatorError(_empty(row))
        raise OperatorError(
            f"action {int(action[row])} of row {row} is not among the row's eligible items; "
            "a policy restricted to them cannot have chosen it"
        )


def check_found(index: Tensor) -> None:
    """Check that a search on the CPU found an item for each row, (B, k) with -1 for none."""
    if index.device.type == "cpu" and index.shape[0] and bool((index[:, 0] < 0).any()):
        raise OperatorError(_empty(int((index[:, 0] < 0).nonzero()[0, 0])))


def _empty(row: int) -> str:
    return f"row {row} has no eligible item; give it at least one, or leave the row out"


def _check_bitmap(
    group: Tensor, bitmap: Tensor, rows: int, items: int | None, device: torch.device
) -> None:
    if items is None:
        items = bitmap.shape[-1] * WORD
    words = -(-items // WORD)
    if group.dtype != torch.int32 or group.shape != (rows,):
        raise OperatorError(
            f"eligible.group must be int32 of shape ({rows},), but is {group.dtype} of "
            f"{tuple(group.shape)}"
        )
    if bitmap.dtype != torch.int64 or bitmap.dim() != 2 or bitmap.shape[1] != words:
        raise OperatorError(
            f"eligible.bitmap must be int64 of shape (G, {words}), {WORD} items a word, but is "
            f"{bitmap.dtype} of {tuple(bitmap.shape)}"
        )
    for name, tensor in (("group", group), ("bitmap", bitmap)):
        _check_device(f"eligible.{name}", tensor, device)
    if device.type != "cpu" or torch.compiler.is_compiling():
        return
    if rows:
        low, high = (int(x) for x in torch.aminmax(group))
        if low < 0 or high >= bitmap.shape[0]:
            row = int(((group < 0) | (group >= bitmap.shape[0])).nonzero()[0])
            raise OperatorError(
                f"eligible.group of row {row} is {int(group[row])}, but eligible.bitmap has "
                f"{bitmap.shape[0]} rows"
            )
    if items % WORD and bool((bitmap[:, -1] & (-1 << items % WORD)).any()):
        raise OperatorError(
            f"eligible.bitmap has bits beyond the {items} items; the last word's other bits must "
            "be 0"
        )


def _check_lists(
    name: str, lists: ItemLists, rows: int, items: int | None, device: torch.device
) -> None:
    offsets, item = lists.offsets, lists.items
    if offsets.dtype != torch.int64 or offsets.shape != (rows + 1,):
        raise OperatorError(
            f"{name}.offsets must be int64 of shape ({rows + 1},), one more than rows, but is "
            f"{offsets.dtype} of {tuple(offsets.shape)}"
        )
    if item.dtype != torch.int64 or item.dim() != 1:
        raise OperatorError(
            f"{name}.items must be int64 of one dimension, but is {item.dtype} of "
            f"{tuple(item.shape)}"
        )
    _check_device(f"{name}.offsets", offsets, device)
    _check_device(f"{name}.items", item, device)
    if device.type != "cpu" or torch.compiler.is_compiling():
        return
    length = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != item.shape[0] or bool((length < 0).any()):
        raise OperatorError(
            f"{name}.offsets must rise from 0 to {item.shape[0]}, the number of entries"
        )
    if not item.numel():
        return
    outside = item < 0 if items is None else (item < 0) | (item >= items)
    # An entry may be at or below the one before it only where a row starts.
    fall = torch.ones_like(outside)
    torch.le(item[1:], item[:-1], out=fall[1:])
    fall[offsets[:-1][length > 0]] = False
    for wrong, why in (
        (outside, f"out of range: there are {items} items" if items else "out of range"),
        (fall, "not above the one before it; sort each row's items and drop repeats"),
    ):
        if bool(wrong.any()):
            entry = int(wrong.nonzero()[0])
            row = int(torch.searchsorted(offsets, entry, right=True)) - 1
            raise OperatorError(f"{name} of row {row}: item {int(item[entry])} is {why}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise OperatorError(f"{name} is on {tensor.device}, but the embeddings are on {device}")
