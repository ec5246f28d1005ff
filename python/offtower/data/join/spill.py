"""Records of both sides by partition, in temporary files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PARTITIONS = 256


@dataclass
class Spill:
    """Records by partition, in files that are opened for each write."""

    folder: Path
    kind: np.dtype[Any]
    waiting: list[NDArray[Any]] = field(default_factory=list)
    rows: int = 0

    def add(self, records: NDArray[Any]) -> None:
        """Keep records until there are enough for a write to each file."""
        self.waiting.append(records)
        self.rows += len(records)
        if self.rows >= 4096 * PARTITIONS:
            self.close()

    def close(self) -> None:
        """Write what waits."""
        if not self.waiting:
            return
        records = np.concatenate(self.waiting)
        self.waiting, self.rows = [], 0
        partition = (records["key"][:, 0] >> np.uint64(56)).astype(np.int64)
        order = np.argsort(partition, kind="stable")
        ends = np.cumsum(np.bincount(partition, minlength=PARTITIONS))
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(np.split(records[order], ends[:-1])):
            if len(part):
                with open(self.folder / str(number), "ab") as file:
                    part.tofile(file)

    def read(self, partition: int) -> NDArray[Any]:
        """Read the records of a partition."""
        path = self.folder / str(partition)
        if not path.exists():
            return np.empty(0, dtype=self.kind)
        return np.fromfile(path, dtype=self.kind)
