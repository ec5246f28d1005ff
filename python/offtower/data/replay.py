"""A log with rows of older logs beside its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.log import Log, ParquetLog, TableOrigin
from offtower.data.round_tables import whole_rounds
from offtower.errors import DataError

_LEAST_SHARE = 0.25
"""Share of a row group's rows that are taken at least, so that few groups are read."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows of a row group of an older log."""

    log: ParquetLog
    group: int
    rows: NDArray[np.int64]


class ReplayLog(Log):
    """The row groups of a log, and after them rows drawn from row groups of older logs.

    Rows keep their propensities. Those of items that are not in the catalogue are left out, with
    all of their round: a policy over the catalogue has weight 0 there. Of logs of slates whole row
    groups are taken.

    Args:
        own: the log.
        older: by address, logs of the same schema.
        catalogue: of the run.
        share: of drawn rows among all; fewer where the older logs have fewer.
        seed: of the draws.

    Attributes:
        own, older: as given. left_out: rows of removed items in the row groups that were drawn.
    """

    def __init__(
        self,
        own: Log,
        older: Mapping[str, ParquetLog],
        catalogue: Catalogue,
        share: float,
        seed: int,
    ) -> None:
        self.own, self.older, self.schema = own, dict(older), own.schema
        self.left_out = 0
        wanted = round(share / (1.0 - share) * own.num_rows)
        self._parts = self._drawn(catalogue, wanted, np.random.default_rng(seed))
        sizes = [len(part.rows) for part in self._parts]
        self.row_group_sizes = np.concatenate([own.row_group_sizes, sizes]).astype(np.int64)
        digest = hashlib.sha256(own.fingerprint.encode())
        for log in self.older.values():
            digest.update(log.fingerprint.encode())
        for part in self._parts:
            digest.update(part.rows.tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def own_groups(self) -> int:
        """Number of the log's own row groups, which come first."""
        return len(self.own.row_group_sizes)

    @property
    def replayed(self) -> int:
        """Number of rows of older logs."""
        return self.num_rows - self.own.num_rows

    def read_row_group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        if index < self.own_groups:
            return self.own.read_row_group(index, columns)
        part = self._parts[index - self.own_groups]
        return part.log.read_row_group(part.group, columns).take(pa.array(part.rows))

    def location(self, index: int) -> TableOrigin:
        if index < self.own_groups:
            return self.own.location(index)
        part = self._parts[index - self.own_groups]
        # The rows are some of the group's: their numbers in the file are not known here.
        return part.log.location(part.group)._replace(file_row=None)

    def _drawn(self, catalogue: Catalogue, wanted: int, rng: np.random.Generator) -> list[_Part]:
        groups = [(log, g) for log in self.older.values() for g in range(len(log.row_group_sizes))]
        total = sum(log.num_rows for log in self.older.values())
        share = 1.0 if self.schema.slates else max(_LEAST_SHARE, wanted / max(total, 1))
        parts: list[_Part] = []
        for number in rng.permutation(len(groups)):
            if wanted <= 0:
                break
            log, group = groups[number]
            known = self._known(log, group, catalogue)
            count = len(known)
            if not self.schema.slates:
                count = min(wanted, count, round(share * int(log.row_group_sizes[group])))
            if count:
                rows = np.sort(rng.choice(known, count, replace=False))
                parts.append(_Part(log, group, rows))
                wanted -= count
        return parts

    def _known(self, log: ParquetLog, group: int, catalogue: Catalogue) -> NDArray[np.int64]:
        """Rows of a row group whose items, and those of their round, are in the catalogue."""
        schema = self.schema
        of_round = [schema.round_id, schema.position] if schema.slates else []
        names = [schema.action, *(name for name in of_round if name is not None)]
        table = log.read_row_group(group, names)
        gone = catalogue.index_of(table.column(schema.action)) < 0
        gone = whole_rounds(gone, table, schema)
        self.left_out += int(gone.sum())
        return np.flatnonzero(~gone)


def replay(
    own: Log, places: Sequence[str], catalogue: Catalogue, share: float, seed: int
) -> ReplayLog:
    """Open older logs and draw rows of them.

    Raises:
        DataError: one cannot be read with the schema of `own`, or holds files of it or of another
            one, whose rows would count twice.
    """
    older = {}
    files = {"data.train": own.content.files} if isinstance(own, ParquetLog) else {}
    for place in places:
        try:
            older[place] = ParquetLog.open(place, own.schema)
        except DataError as error:
            raise DataError(f"incremental.replay.logs: {error}") from error
        for name, known in files.items():
            if shared := older[place].content.shared_files(known):
                raise DataError(
                    f"incremental.replay.logs: '{place}' has {shared} of its files in common with "
                    f"{name}, and their rows would be read twice: leave it out of one of them"
                )
        files[f"'{place}'"] = older[place].content.files
    return ReplayLog(own, older, catalogue, share, seed)
