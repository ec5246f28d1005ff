"""Counts of values that an encoding did not see in training, or that are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.encoding import BagArray, FeatureArrays, FeatureEncoding


@dataclass
class UnknownValues:
    """Rows with unseen or missing values of each category, bag and history with a
    vocabulary.

    Hashed features have no unseen values: a new one shares the row of the table of another.

    Attributes:
        rows: rows read.
        unknown: by feature, rows with a value that is null or was not seen in training.
        missing: by feature, those of them that are null; only where tables were read.
    """

    rows: int = 0
    unknown: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)

    def add(self, encoding: FeatureEncoding, arrays: FeatureArrays, rows: int) -> None:
        """Count in encoded rows."""
        self.rows += rows
        for name, hit in unknown_rows(encoding, arrays).items():
            if count := int(np.count_nonzero(hit)):
                self.unknown[name] += count

    def add_table(self, encoding: FeatureEncoding, table: pa.Table) -> None:
        """Count in the rows of a table, null values apart."""
        self.add(encoding, encoding.encode(table), table.num_rows)
        self.add_missing(encoding, table)

    def add_missing(self, encoding: FeatureEncoding, table: pa.Table) -> None:
        """Count the null values of rows that `add` has counted."""
        for spec in encoding.specs:
            # A null bag is an empty one, a value like any other.
            if spec.kind == "category" and spec.name in self.unknown:
                self.missing[spec.name] += table.column(spec.source).null_count

    def merge(self, later: UnknownValues) -> None:
        """Add the counts over later rows."""
        self.rows += later.rows
        self.unknown += later.unknown
        self.missing += later.missing

    def to_dict(self) -> dict[str, dict[str, int]]:
        """By feature: rows, unknown and missing."""
        return {
            name: {"rows": self.rows, "unknown": count, "missing": self.missing[name]}
            for name, count in sorted(self.unknown.items())
        }

    def sentences(self, what: str) -> list[str]:
        """One sentence per feature with unknown values; what: names the rows, such as contexts."""
        return [
            f"feature '{name}': {count:,} of {self.rows:,} {what} ({count / self.rows:.2%}) have a "
            "value that training did not see, or none"
            + (f" ({self.missing[name]:,} are null)" if self.missing[name] else "")
            + "; all such values share one embedding"
            for name, count in sorted(self.unknown.items())
        ]


def unknown_rows(
    encoding: FeatureEncoding, arrays: Mapping[str, np.ndarray | BagArray]
) -> dict[str, NDArray[np.bool_]]:
    """By category, bag or history with a vocabulary, the (n,) rows with an unseen or null value."""
    found = {}
    for spec in encoding.specs:
        if spec.kind not in ("category", "bag", "history") or spec.encoding != "vocabulary":
            continue
        values = arrays[spec.name]
        if isinstance(values, BagArray):
            hits = np.concatenate([[0], np.cumsum(values.values == 0)])
            found[spec.name] = hits[values.offsets[1:]] > hits[values.offsets[:-1]]
        else:
            found[spec.name] = values == 0
    return found
