"""Logs whose contexts have histories of items."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from offtower.data import ParquetLog, write_log
from offtower.data.schema import FeatureSpec

HISTORY = FeatureSpec(
    name="seen", kind="history", length=5, times="seen_at", events="seen_as", dwell="seen_for"
)


def with_histories(table: pa.Table, items: list[object], seed: int) -> pa.Table:
    """The rows with histories of 0 to 7 of the items, some unknown, from before their timestamps
    (numbers); one in ten is null."""
    rng = np.random.default_rng(seed)
    times = table.column("timestamp").to_numpy(zero_copy_only=False)
    columns: dict[str, list[object]] = {name: [] for name in HISTORY.sources}
    for time in times:
        size = int(rng.integers(0, 8))
        rows = (
            [items[k] for k in rng.integers(0, len(items), size)],
            sorted(int(time) - 1 - int(age) for age in rng.integers(0, 10_000, size)),
            [str(kind) for kind in rng.choice(["click", "buy"], size)],
            [float(number) for number in rng.gamma(2.0, 5.0, size)],
        )
        missing = rng.random() < 0.1
        for values, row in zip(columns.values(), rows, strict=True):
            values.append(None if missing else row)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table


def add_histories(folder: Path, unknown: object) -> None:
    """Rewrite the logs of a folder of `write_world` with histories."""
    import pyarrow.parquet as pq

    items = pq.read_table(folder / "catalogue").column("item_id").to_pylist()
    for seed, name in enumerate(("train", "validation", "test")):
        log = ParquetLog.open(folder / name)
        tables = [with_histories(one, [*items, unknown], seed + 7) for one in _plain(log)]
        schema = replace(log.schema, context=(*log.schema.context, HISTORY))
        write_log(folder / f"{name}_seen", tables, schema, rows_per_group=100)


def _plain(log: ParquetLog) -> list[pa.Table]:
    """The log's tables with times as whole numbers."""
    found = []
    for table in log.tables():
        times = pa.array(table.column("timestamp").to_numpy().astype("datetime64[s]").astype(int))
        place = table.column_names.index("timestamp")
        found.append(table.set_column(place, "timestamp", times))
    return found
