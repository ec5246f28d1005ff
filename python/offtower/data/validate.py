"""What a log must satisfy row by row, and on average: one streaming pass, with standard errors."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.check import BadRow, check_table
from offtower.data.columns import as_float_array, category_values
from offtower.data.log import Log
from offtower.data.rows import hashed

Level = Literal["error", "warning", "info"]

_SHOWN_BAD_ROWS = 5
_NOISY = 0.25
"""A standard error above this share of the expected number says nothing."""
_ALARM = 4.0
"""Standard errors between an average and what it must be, above which it is an error."""


@dataclass(frozen=True)
class Finding:
    """One statement about the log."""

    level: Level
    name: str
    message: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ValidationReport:
    """All findings; `ok` where none is an error."""

    rows: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "rows": self.rows,
            "findings": [
                {
                    "level": finding.level,
                    "name": finding.name,
                    "message": finding.message,
                    "numbers": finding.numbers,
                }
                for finding in self.findings
            ],
        }


@dataclass
class _Mean:
    """Count, mean, squared deviations, largest value and sum; merged batch by batch."""

    count: int = 0
    mean: float = 0.0
    square: float = 0.0
    largest: float = -math.inf
    smallest: float = math.inf

    def add(self, values: NDArray[np.float64]) -> None:
        if values.size == 0:
            return
        count = self.count + values.size
        mean = float(values.mean())
        shift = mean - self.mean
        self.square += float(np.square(values - mean).sum())
        self.square += shift**2 * self.count * values.size / count
        self.mean += shift * values.size / count
        self.count = count
        self.largest = max(self.largest, float(values.max()))
        self.smallest = min(self.smallest, float(values.min()))

    @property
    def std_error(self) -> float:
        if self.count < 2:
            return math.inf
        return math.sqrt(self.square / (self.count - 1) / self.count)


def validate_log(log: Log, catalogue: Catalogue) -> ValidationReport:
    """Check every row and the averages of a log.

    The mean of 1/pscore estimates the number of items that the logging policy can show (exactly N
    where every item has positive probability): E[1/pi_0(a|x)] = #{a: pi_0(a|x) > 0}. A mean far
    above N says that propensities are too small; far below, that they are too large or that many
    items are never shown.

    Raises:
        DataError: a column is missing or can never be right; a file cannot be read.
    """
    collector = _Collector(log, catalogue)
    for index in range(len(log.row_group_sizes)):
        collector.add(log.read_row_group(index), index)
    return ValidationReport(log.num_rows, tuple(collector.findings()))


class _Collector:
    def __init__(self, log: Log, catalogue: Catalogue) -> None:
        self._log = log
        self._schema = log.schema
        self._catalogue = catalogue
        self._bad: list[BadRow] = []
        self._bad_counts: Counter[tuple[str, str]] = Counter()
        self._reward = _Mean()
        self._pscore = _Mean()
        self._inverse: dict[str, _Mean] = defaultdict(_Mean)
        self._shown = np.zeros(catalogue.num_items, dtype=bool)
        self._values: dict[str, set[str]] = {spec.name: set() for spec in log.schema.context}
        self._pairs: list[NDArray[np.uint64]] = []
        self._first_row = 0

    def add(self, table: pa.Table, index: int) -> None:
        schema = self._schema
        bad = check_table(
            table, schema, self._catalogue, self._log.location(index), self._first_row
        )
        for row in bad:
            self._bad_counts[row.column, row.expected] += 1
        self._bad += bad[: max(0, _SHOWN_BAD_ROWS - len(self._bad))]
        if bad:
            kept = np.ones(table.num_rows, dtype=bool)
            kept[[row.row - self._first_row for row in bad]] = False
            table_good = table.filter(pa.array(kept))
        else:
            table_good = table
        self._first_row += table.num_rows
        self._reward.add(as_float_array(table_good.column(schema.reward)))
        self._shown[self._catalogue.index_of(table_good.column(schema.action))] = True
        self._add_pscore(table_good)
        for spec in schema.context:
            seen = self._values[spec.name]
            if len(seen) < 2 and spec.kind in ("numeric", "category"):
                seen |= {str(v) for v in pc.unique(table.column(spec.source)).to_pylist()[:3]}
        if schema.round_id is not None and schema.position is not None:
            key = hashed(table.column(schema.round_id)) * np.uint64(0x9E3779B97F4A7C15)
            self._pairs.append(key ^ hashed(table.column(schema.position)))

    def _add_pscore(self, table: pa.Table) -> None:
        schema = self._schema
        if schema.pscore is None:
            return
        pscore = as_float_array(table.column(schema.pscore))
        self._pscore.add(pscore)
        inverse = 1.0 / pscore
        self._inverse[""].add(inverse)
        if schema.behavior_policy is None:
            return
        names = pc.dictionary_encode(
            category_values(table.column(schema.behavior_policy)).cast(pa.string())
        )
        place = names.indices.to_numpy(zero_copy_only=False)
        for number, name in enumerate(names.dictionary.to_pylist()):
            self._inverse[name].add(inverse[place == number])

    def findings(self) -> list[Finding]:
        found = self._bad_rows()
        found.append(self._mean_reward())
        found += self._propensities()
        found.append(self._coverage())
        found += self._constant_columns()
        found += self._repeated_rounds()
        return found

    def _bad_rows(self) -> list[Finding]:
        if not self._bad_counts:
            return [Finding("info", "rows", f"all {self._log.num_rows:,} rows keep the schema")]
        kinds = "; ".join(
            f"{count:,} x column '{column}', expected {expected}"
            for (column, expected), count in sorted(self._bad_counts.items())
        )
        return [
            Finding(
                "error", "rows", f"bad values: {kinds}", {"bad": sum(self._bad_counts.values())}
            ),
            *(Finding("error", "row", str(row)) for row in self._bad),
        ]

    def _mean_reward(self) -> Finding:
        mean, error = self._reward.mean, self._reward.std_error
        return Finding(
            "info" if self._reward.square > 0 else "warning",
            "reward",
            f"mean reward {mean:.5g} (standard error {error:.2g}), "
            f"from {self._reward.smallest:g} to {self._reward.largest:g}"
            + ("" if self._reward.square > 0 else ": every reward is the same, nothing to learn"),
            {"mean": mean, "std_error": error},
        )

    def _propensities(self) -> list[Finding]:
        if self._schema.pscore is None:
            return [
                Finding(
                    "warning",
                    "pscore",
                    "no propensities: only regression can learn from this log, and no off-policy "
                    "estimate can be made",
                )
            ]
        found = [
            Finding(
                "info",
                "pscore",
                f"pscore from {self._pscore.smallest:.3g} to {self._pscore.largest:.3g}",
                {"smallest": self._pscore.smallest, "largest": self._pscore.largest},
            )
        ]
        policies = [name for name in self._inverse if name] or [""]
        return found + [self._inverse_mean(name, self._inverse[name]) for name in policies]

    def _inverse_mean(self, policy: str, inverse: _Mean) -> Finding:
        n_items = self._catalogue.num_items
        whose = f" of behavior policy '{policy}'" if policy else ""
        text = (
            f"mean of 1/pscore{whose} is {inverse.mean:.4g} (standard error "
            f"{inverse.std_error:.2g}); with {n_items:,} items it must be at most that"
        )
        numbers = {
            "mean": inverse.mean,
            "std_error": inverse.std_error,
            "items": n_items,
            "rows": inverse.count,
        }
        name = "inverse pscore"
        if not inverse.std_error <= _NOISY * n_items:
            return Finding(
                "info", name, text + ": too noisy to say anything about the propensities", numbers
            )
        # The error's own estimate is blind to rows too rare to have been seen; N stands in for it.
        slack = _ALARM * inverse.std_error + 1e-6 * n_items
        if inverse.mean > n_items + slack:
            return Finding(
                "error",
                name,
                text + ": propensities are too small (are they of one position out of several, "
                "or of a whole slate?)",
                numbers,
            )
        if inverse.mean < 0.5 * n_items - slack:
            return Finding(
                "warning",
                name,
                text + ": the logging policy shows a part of the catalogue only, or propensities "
                "are too large",
                numbers,
            )
        return Finding("info", name, text + ": consistent", numbers)

    def _coverage(self) -> Finding:
        shown = int(self._shown.sum())
        share = shown / self._catalogue.num_items
        return Finding(
            "info" if share > 0.5 else "warning",
            "coverage",
            f"{shown:,} of {self._catalogue.num_items:,} items are shown at least once ({share:.1%})"
            + ("" if share > 0.5 else "; the log says nothing of the others"),
            {"shown": shown, "items": self._catalogue.num_items},
        )

    def _constant_columns(self) -> list[Finding]:
        return [
            Finding("warning", "constant", f"feature '{name}' has one value in every row")
            for name, seen in self._values.items()
            if len(seen) == 1 and self._log.num_rows > 1
        ]

    def _repeated_rounds(self) -> list[Finding]:
        if not self._pairs:
            return []
        keys = np.concatenate(self._pairs)
        twice = len(keys) - len(np.unique(keys))
        if twice == 0:
            return []
        return [
            Finding(
                "error",
                "repeats",
                f"{twice:,} rows repeat a (round, position) that another row has",
                {"rows": twice},
            )
        ]
