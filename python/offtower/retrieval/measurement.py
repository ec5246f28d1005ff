"""Contexts that an export is measured on, from a held-out log if there is one."""

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
    """Return the log that an export is measured on, and the name of that part of the data."""
    if given is not None:
        return ParquetLog.open(given, log_schema(config)), "given"
    for part in ("test", "validation", "train"):
        path = getattr(config.data, part)
        if path is not None and Location.of(path).exists():
            return ParquetLog.open(path, log_schema(config)), part
    raise DataError(
        "none of the run's logs exists to take contexts from; pass --contexts with a log"
    )


def sample_contexts(
    log: ParquetLog, encoding: FeatureEncoding, count: int, seed: int = 0
) -> pa.Table:
    """Draw up to `count` rows from random row groups, with the context columns."""
    columns = list(encoding.columns)
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
    return pa.concat_tables(parts).combine_chunks()
