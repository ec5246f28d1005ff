"""What a log must satisfy row by row, and on average: one streaming pass, with standard errors."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.check import BadRow, count_faults, first_bad_rows
from offtower.data.columns import as_float_array, category_values, splitmix64
from offtower.data.log import Log
from offtower.data.rows import hashed
from offtower.data.rules import find_faults

Target = Callable[[pa.Table], NDArray[np.floating]]

Level = Literal["error", "warning", "info"]

_SHOWN_BAD_ROWS = 5
_NOISY = 0.25
"""A standard error above this share of the expected number says nothing."""
_HEAVY = 0.1
"""Share of a sum in one value, above which its standard error is not to be believed."""
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
                    "numbers": {
                        name: value if math.isfinite(value) else None
                        for name, value in finding.numbers.items()
                    },
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

    def too_noisy(self, expected: float) -> bool:
        """Whether the mean says nothing beside `expected`, or hangs on one value: then the
        standard error itself is not to be believed."""
        heaviest = self.largest > _HEAVY * self.count * abs(self.mean)
        return not self.std_error <= _NOISY * expected or heaviest


class _Repeats:
    """Counts keys that occur again, in bounded memory: beyond a limit only keys below a falling
    threshold are kept, all occurrences of each, and the count is scaled up."""

    def __init__(self, limit: int = 8_000_000) -> None:
        self._limit = limit
        self._parts: list[NDArray[np.uint64]] = []
        self._distinct = np.zeros(0, dtype=np.uint64)
        self._waiting = 0
        self._repeats = 0
        self.shift = 0

    def add(self, keys: NDArray[np.uint64]) -> None:
        mixed = splitmix64(keys)
        if self.shift:
            mixed = mixed[mixed >> np.uint64(64 - self.shift) == 0]
        self._parts.append(mixed)
        self._waiting += len(mixed)
        if self._waiting > self._limit:
            self._join()

    def _join(self) -> None:
        keys = np.concatenate([self._distinct, *self._parts])
        self._parts, self._waiting = [], 0
        self._distinct = np.unique(keys)
        self._repeats += len(keys) - len(self._distinct)
        while len(self._distinct) > self._limit:
            self.shift += 1
            self._distinct = self._distinct[self._distinct >> np.uint64(64 - self.shift) == 0]
            self._repeats //= 2

    def count(self) -> int:
        """Rows that repeat an earlier key; an estimate where `shift` is above 0."""
        self._join()
        return self._repeats << self.shift


def validate_log(log: Log, catalogue: Catalogue, target: Target | None = None) -> ValidationReport:
    """Check every row and the averages of a log.

    The mean of 1/pscore estimates the number of items that the logging policy can show (exactly N
    where every item has positive probability): E[1/pi_0(a|x)] = #{a: pi_0(a|x) > 0}. A mean far
    above N says that propensities are too small; far below, that they are too large or that many
    items are never shown.

    Args:
        target: of a table with n rows, the (n,) probabilities pi(a_i|x_i) that a policy gives the
            logged actions. The mean of pi/pscore is the share of the policy's mass that the log
            can speak of; the rest has no support.

    Raises:
        DataError: a column is missing or can never be right; a file cannot be read.
    """
    collector = _Collector(log, catalogue, target)
    for index in range(len(log.row_group_sizes)):
        collector.add(log.read_row_group(index), index)
    return ValidationReport(log.num_rows, tuple(collector.findings()))


class _Collector:
    def __init__(self, log: Log, catalogue: Catalogue, target: Target | None) -> None:
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
        self._pairs = _Repeats()
        self._target = target
        self._weight = _Mean()
        self._first_row = 0

    def add(self, table: pa.Table, index: int) -> None:
        schema = self._schema
        location = self._log.location(index)
        faults = find_faults(table, schema, self._catalogue, location[0])
        table_good = table
        if faults:
            self._bad_counts.update(count_faults(faults))
            wanted = _SHOWN_BAD_ROWS - len(self._bad)
            self._bad += first_bad_rows(table, faults, location, self._first_row, wanted)
            bad = np.logical_or.reduce([fault.mask for fault in faults])
            table_good = table.filter(pa.array(~bad))
        self._first_row += table.num_rows
        if table_good.num_rows == 0:
            return
        self._reward.add(as_float_array(table_good.column(schema.reward)))
        self._shown[self._catalogue.index_of(table_good.column(schema.action))] = True
        self._add_pscore(table_good)
        for spec in schema.context:
            seen = self._values[spec.name]
            if len(seen) < 2 and spec.kind in ("numeric", "category"):
                seen |= {str(v) for v in pc.unique(table.column(spec.source)).to_pylist()[:3]}
        if schema.round_id is not None and schema.position is not None:
            key = hashed(table_good.column(schema.round_id))
            self._pairs.add(splitmix64(key) ^ hashed(table_good.column(schema.position)))
        if self._target is not None and schema.pscore is not None:
            logged = as_float_array(table_good.column(schema.pscore))
            self._weight.add(np.asarray(self._target(table_good), dtype=np.float64) / logged)

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
            f"{count:,} x column '{column}' is {problem}"
            for (column, problem), count in sorted(self._bad_counts.items())
        )
        return [
            Finding(
                "error", "rows", f"bad values: {kinds}", {"bad": sum(self._bad_counts.values())}
            ),
            *(Finding("error", "row", str(row)) for row in self._bad),
        ]

    def _mean_reward(self) -> Finding:
        if self._reward.count == 0:
            return Finding("error", "reward", "no row is good, so nothing can be averaged")
        mean, error = self._reward.mean, self._reward.std_error
        return Finding(
            "info" if self._reward.square > 0 else "warning",
            "reward",
            f"mean reward {mean:.5g} (standard error {error:.2g}; 95% interval "
            f"{mean - 1.96 * error:.5g} to {mean + 1.96 * error:.5g}), "
            f"from {self._reward.smallest:g} to {self._reward.largest:g}"
            + ("" if self._reward.square > 0 else ": every reward is the same, nothing to learn"),
            {
                "mean": mean,
                "std_error": error,
                "low": mean - 1.96 * error,
                "high": mean + 1.96 * error,
            },
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
        if self._pscore.count == 0:
            return []
        found = [
            Finding(
                "info",
                "pscore",
                f"pscore from {self._pscore.smallest:.3g} to {self._pscore.largest:.3g}",
                {"smallest": self._pscore.smallest, "largest": self._pscore.largest},
            )
        ]
        policies = [name for name in self._inverse if name] or [""]
        found += [self._inverse_mean(name, self._inverse[name]) for name in policies]
        return found + self._policies_agree(policies) + self._target_mass()

    def _policies_agree(self, policies: list[str]) -> list[Finding]:
        """Whether the policies' means of 1/pscore are the same number, as those of policies that
        can show the same items are."""
        if len(policies) < 2:
            return []
        name = "behavior policies"
        means = [self._inverse[policy] for policy in policies]
        low, high = min(means, key=lambda m: m.mean), max(means, key=lambda m: m.mean)
        error = math.hypot(low.std_error, high.std_error)
        text = (
            f"the means of 1/pscore of {len(policies)} behavior policies differ by at most "
            f"{high.mean - low.mean:.4g} (standard error {error:.2g}). The mean weight of one "
            "against another cannot be tested: a log holds only its own policy's probabilities"
        )
        numbers = {"difference": high.mean - low.mean, "std_error": error}
        if any(m.too_noisy(self._catalogue.num_items) for m in (low, high)):
            return [Finding("info", name, text + ". Too noisy to say more", numbers)]
        if high.mean - low.mean > _ALARM * error + 1e-6 * high.mean:
            text += ". They can show different items, or the propensities of one are wrong"
            return [Finding("warning", name, text, numbers)]
        return [Finding("info", name, text, numbers)]

    def _target_mass(self) -> list[Finding]:
        weight = self._weight
        if weight.count == 0:
            return []
        lost = 1.0 - weight.mean
        text = (
            f"mean weight of the target policy is {weight.mean:.4g} (standard error "
            f"{weight.std_error:.2g}), so {max(lost, 0.0):.1%} of its mass is on items that the "
            "log cannot speak of"
        )
        numbers = {"mean": weight.mean, "std_error": weight.std_error, "without_support": lost}
        if weight.too_noisy(1.0):
            return [Finding("info", "target", text + ": too noisy to say anything", numbers)]
        slack = _ALARM * weight.std_error + 1e-6
        if weight.mean > 1.0 + slack:
            return [
                Finding("error", "target", text + ": above 1, propensities are too small", numbers)
            ]
        level: Level = "warning" if lost > slack else "info"
        return [Finding(level, "target", text, numbers)]

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
        if inverse.too_noisy(n_items):
            return Finding(
                "info", name, text + ": too noisy to say anything about the propensities", numbers
            )
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
            f"{shown:,} of {self._catalogue.num_items:,} items are shown at least once "
            f"({share:.1%})" + ("" if share > 0.5 else "; the log says nothing of the others"),
            {"shown": shown, "items": self._catalogue.num_items},
        )

    def _constant_columns(self) -> list[Finding]:
        return [
            Finding("warning", "constant", f"feature '{name}' has one value in every row")
            for name, seen in self._values.items()
            if len(seen) == 1 and self._log.num_rows > 1
        ]

    def _repeated_rounds(self) -> list[Finding]:
        twice = self._pairs.count()
        if twice == 0:
            return []
        return [
            Finding(
                "error",
                "repeats",
                f"{'about ' if self._pairs.shift else ''}{twice:,} rows repeat a (round, position) "
                "that another row has",
                {"rows": twice},
            )
        ]
