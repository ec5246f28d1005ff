"""Encoded row groups in temporary files of this node, so that later epochs only map them."""

from __future__ import annotations

import logging
import mmap
import tempfile

import pyarrow as pa

from offtower.data.row_batches import from_batch, to_batch
from offtower.data.rows import EncodedRows

logger = logging.getLogger("offtower.data")


class EncodedCache:
    """Row groups as memory-mapped Arrow IPC files without a name: they end with the process.

    Args:
        max_bytes: largest size of all files; further row groups are not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes
        self._batches: dict[int, pa.RecordBatch] = {}
        self._like: EncodedRows | None = None

    def __contains__(self, group: int) -> bool:
        return group in self._batches

    def get(self, group: int) -> EncodedRows:
        """Return the rows of a kept row group, as read-only views of its file."""
        assert self._like is not None, "a row group was kept"
        eligible = self._like.eligible
        return from_batch(
            self._batches[group],
            None if eligible is None else eligible.items,
            self._like.pscore_kind,
        )

    def put(self, group: int, rows: EncodedRows) -> None:
        """Keep the rows of a row group, if there is room for them."""
        if rows.nbytes > self._left:
            return
        batch = to_batch(rows)
        try:
            with tempfile.TemporaryFile(prefix="offtower-rows-") as file:
                with pa.ipc.new_file(pa.PythonFile(file, "w"), batch.schema) as writer:
                    writer.write_batch(batch)
                file.flush()
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            logger.warning("encoded rows are not kept any more: %s", error)
            self._left = 0
            return
        self._left -= len(content)
        self._batches[group] = pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)
        self._like = rows.take(rows.row[:0])
