"""Eligible items in the learner's forms: a mask of rounds and actions, or a schema's section."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.eligible import eligible_items
from offtower.data.eligible_schema import EligibleSchema, ListForm
from offtower.data.log import TableLog
from offtower.data.schema import LogSchema
from offtower.errors import DataError
from offtower.ops import Eligibility, ItemLists

COLUMN = "eligible"
"""Column of the log, and key of a bandit-feedback dict."""

Mask = NDArray[np.bool_]


def with_candidates(log: TableLog, mask: Any) -> TableLog:
    """Restrict the rows of a log to the actions of a mask (n_rounds, n_actions).

    Raises:
        DataError: the mask has another number of rows, or a row without an action.
    """
    found = _checked(mask, log.num_rows)
    offsets = np.concatenate([[0], np.cumsum(found.sum(axis=1))]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.nonzero(found)[1]))
    schema = replace(log.schema, eligible=EligibleSchema(candidates=ListForm(COLUMN)))
    return TableLog(log.table.append_column(COLUMN, lists), schema)


def of_mask(mask: Any, rounds: int) -> Eligibility:
    """The sets of a mask (n_rounds, n_actions), for the operators.

    Raises:
        DataError: as for `with_candidates`.
    """
    found = _checked(mask, rounds)
    offsets = np.concatenate([[0], np.cumsum(found.sum(axis=1))]).astype(np.int64)
    items = torch.from_numpy(np.nonzero(found)[1].astype(np.int64))
    return Eligibility(candidates=ItemLists(torch.from_numpy(offsets), items))


def of_table(contexts: pa.Table, schema: LogSchema | None, items: Catalogue) -> Eligibility | None:
    """The sets of contexts by a schema's section; None without one.

    Raises:
        DataError: as for `EligibleItems.of_contexts`.
    """
    sets = None if schema is None else eligible_items(items, schema)
    return None if sets is None else sets.of_contexts(contexts).on()


def masked(logits: torch.Tensor, eligible: Eligibility | None) -> torch.Tensor:
    """Logits (n, N) with -inf for items that are not eligible."""
    if eligible is None:
        return logits
    n, items = logits.shape
    row = torch.arange(n, device=logits.device).repeat_interleave(items)
    there = eligible.contains(row, torch.arange(items, device=logits.device).repeat(n))
    return logits.masked_fill(~there.view(n, items), float("-inf"))


def _checked(mask: Any, rounds: int) -> Mask:
    found = np.asarray(mask)
    if found.ndim != 2 or len(found) != rounds or found.dtype.kind != "b":
        raise DataError(
            f"'eligible' must be true or false of shape ({rounds}, n_actions), but is "
            f"{found.dtype} of shape {found.shape}"
        )
    empty = np.flatnonzero(~found.any(axis=1))
    if empty.size:
        raise DataError(f"row {empty[0]} of 'eligible' has no eligible action")
    return found
