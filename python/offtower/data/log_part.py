"""Some row groups of a log, as a log of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from offtower.data.log import Log, TableOrigin


class LogPart(Log):
    """A log of some row groups of another one, which keeps the other's fingerprint.

    Row numbers are those within the part.

    Args:
        whole: the log.
        groups: numbers of the row groups, ascending.
    """

    def __init__(self, whole: Log, groups: Sequence[int]) -> None:
        self._whole = whole
        self._groups = list(groups)
        self.schema = whole.schema
        self.fingerprint = whole.fingerprint
        self.row_group_sizes = whole.row_group_sizes[np.asarray(self._groups, dtype=np.int64)]

    def read_row_group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        return self._whole.read_row_group(self._groups[index], columns)

    def read_row_groups(
        self, indexes: Iterable[int], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        return self._whole.read_row_groups([self._groups[k] for k in indexes], columns)

    def location(self, index: int) -> TableOrigin:
        return self._whole.location(self._groups[index])
