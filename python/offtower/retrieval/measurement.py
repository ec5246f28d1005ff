"""Contexts to measure an export on: rows of a log that training did not learn from, if there is."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from offtower.config import Config
from offtower.data.encoding import FeatureEncoding
from offtower.data.location import AnyPath, Location
from offtower.data.log import ParquetLog
from offtower.errors import DataError
from offtower.prepare import log_schema


def measurement_log(config: Config, given: AnyPath | None = None) -> tuple[ParquetLog, str]:
    """The log whose contexts an export is measured on, and which part of the data it is."""
    if given is not None:
        return ParquetLog.open(given, log_schema(config)), "given"
    for part in ("test", "validation", "train"):
        place = getattr(config.data, part)
        if place is not None and Location.of(place).exists():
            return ParquetLog.open(place, log_schema(config)), part
    raise DataError(
        "none of the run's logs is there to take contexts from; pass --contexts with a log"
    )


def sample_contexts(
    log: ParquetLog, encoding: FeatureEncoding, count: int, seed: int = 0
) -> pa.Table:
    """Up to `count` rows of random row groups, with the columns of the context features."""
    columns = list(dict.fromkeys(spec.source for spec in encoding.specs))
    rng = np.random.default_rng(seed)
    groups = rng.permutation(len(log.row_group_sizes))
    parts: list[pa.Table] = []
    rows = 0
    per_group = max(1, -(-count // min(len(groups), 8)))
    for group in groups:
        if rows >= count:
            break
        table = log.read_row_group(int(group), columns)
        picked = np.sort(rng.permutation(table.num_rows)[: min(per_group, count - rows)])
        parts.append(table.take(pa.array(picked)))
        rows += len(picked)
    # Few row groups, or small ones: what is missing comes from wherever there is more.
    return pa.concat_tables(parts).combine_chunks()
