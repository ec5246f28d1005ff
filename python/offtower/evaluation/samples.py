"""Samples taken from batches of a log: frozen dataclasses of arrays that join row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np

S = TypeVar("S")


def joined(samples: Sequence[S]) -> S:
    """One sample with the rows of all, in their order.

    Arrays are concatenated, dictionaries and dataclasses joined field by field; other values must
    be the same in all samples.
    """
    return samples[0] if len(samples) == 1 else _join(list(samples))


def _join(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    if isinstance(first, dict):
        return {key: _join([value[key] for value in values]) for key in first}
    if is_dataclass(first) and not isinstance(first, type):
        columns = {f.name: _join([getattr(v, f.name) for v in values]) for f in fields(first)}
        return type(first)(**columns)
    return first
