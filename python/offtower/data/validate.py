"""Validation of a log in one streaming pass: every row, and averages with standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from offtower.data.catalogue import Catalogue
from offtower.data.eligible import reading_index
from offtower.data.log import Log
from offtower.data.log_sums import LogSums, Target
from offtower.data.moments import Moments
from offtower.data.schema import LogSchema
from offtower.mapping import Mapper, merge_all, pieces
from offtower.progress import Progress, report_rows

Level = Literal["error", "warning", "info"]

_PART_ROWS = 1_000_000
"""Approximate rows of a part of the log."""
_ALARM = 4.0
"""Standard errors of deviation from which an average is an error."""


@dataclass(frozen=True)
class Finding:
    """A result of the validation."""

    level: Level
    name: str
    message: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ValidationReport:
    """All findings; `ok` if none is an error."""

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


def validate_log(
    log: Log,
    catalogue: Catalogue,
    target: Target | None = None,
    *,
    mapper: Mapper | None = None,
    progress: Progress | None = None,
) -> ValidationReport:
    """Check every row and the averages of a log.

    The mean of 1/pscore estimates the number of items that the logging policy can show (exactly N
    where every item has positive probability): E[1/pi_0(a|x)] = #{a: pi_0(a|x) > 0}. A mean far
    above N says that propensities are too small; far below, that they are too large or that many
    items are never shown.

    Args:
        target: maps a table of n rows to (n,) probabilities pi(a_i|x_i) of the logged actions under
            a policy. The mean of pi/pscore is the share of the policy's mass with support.
        mapper: reads the parts of the log; the results have the same bits with any.

    Raises:
        DataError: a column is missing or has a wrong type; a file cannot be read.
    """
    mapper, progress = mapper or Mapper(), progress or Progress()
    sizes = log.row_group_sizes
    groups = max(1, round(_PART_ROWS / max(1.0, float(sizes.mean()))))
    parts = pieces(len(sizes), groups, mapper.workers)
    progress.start("validating", log.num_rows)
    index = reading_index(catalogue, log.schema)
    found = mapper.map(partial(_sums_of, log, index, target), parts, "validating")
    sums = merge_all(report_rows(found, progress), empty="the log has no rows")
    progress.finish()
    return ValidationReport(log.num_rows, tuple(_Findings(sums, log.schema, catalogue).all()))


def _sums_of(log: Log, catalogue: Catalogue, target: Target | None, groups: range) -> LogSums:
    first_rows = log.first_rows
    return merge_all(
        LogSums.of(
            table,
            log.schema,
            catalogue,
            log.location(group),
            int(first_rows[group]),
            target,
        )
        for group, table in zip(groups, log.read_row_groups(groups), strict=True)
    )


class _Findings:
    """Findings from the sums over a log."""

    def __init__(self, sums: LogSums, schema: LogSchema, catalogue: Catalogue) -> None:
        self._sums = sums
        self._schema = schema
        self._num_items = catalogue.num_items

    def all(self) -> list[Finding]:
        found = self._bad_rows()
        found.append(self._mean_reward())
        found += self._propensities()
        found.append(self._coverage())
        found += self._constant_columns()
        found += self._repeated_rounds()
        return found

    def _bad_rows(self) -> list[Finding]:
        if not self._sums.bad_counts:
            return [Finding("info", "rows", f"all {self._sums.rows:,} rows keep the schema")]
        kinds = "; ".join(
            f"{count:,} x column '{column}' is {problem}"
            for (column, problem), count in sorted(self._sums.bad_counts.items())
        )
        return [
            Finding(
                "error",
                "rows",
                f"bad values: {kinds}",
                {"bad": sum(self._sums.bad_counts.values())},
            ),
            *(Finding("error", "row", str(row)) for row in self._sums.bad),
        ]

    def _mean_reward(self) -> Finding:
        reward = self._sums.reward
        if reward.count == 0:
            return Finding("error", "reward", "no row is good, so there is no mean")
        mean, error = reward.mean, reward.std_error
        return Finding(
            "info" if reward.square > 0 else "warning",
            "reward",
            f"mean reward {mean:.5g} (standard error {error:.2g}; 95% interval "
            f"{mean - 1.96 * error:.5g} to {mean + 1.96 * error:.5g}), "
            f"from {reward.smallest:g} to {reward.largest:g}"
            + ("" if reward.square > 0 else ": all rewards are equal, nothing to learn"),
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
        if self._sums.pscore.count == 0:
            return []
        found = [
            Finding(
                "info",
                "pscore",
                f"pscore from {self._sums.pscore.smallest:.3g} to {self._sums.pscore.largest:.3g}",
                {"smallest": self._sums.pscore.smallest, "largest": self._sums.pscore.largest},
            )
        ]
        policies = [name for name in self._sums.inverse if name] or [""]
        found += [self._inverse_mean(name, self._sums.inverse[name]) for name in policies]
        return found + self._policies_agree(policies) + self._target_mass()

    def _policies_agree(self, policies: list[str]) -> list[Finding]:
        """Compare the policies' means of 1/pscore, which are equal for equal sets of items."""
        if len(policies) < 2:
            return []
        name = "behavior policies"
        means = [self._sums.inverse[policy] for policy in policies]
        low, high = min(means, key=lambda m: m.mean), max(means, key=lambda m: m.mean)
        error = math.hypot(low.std_error, high.std_error)
        text = (
            f"the means of 1/pscore of {len(policies)} behavior policies differ by at most "
            f"{high.mean - low.mean:.4g} (standard error {error:.2g}). The mean weight of one "
            "against another cannot be tested: a log holds only its own policy's probabilities"
        )
        numbers = {"difference": high.mean - low.mean, "std_error": error}
        if any(m.too_noisy(self._num_items) for m in (low, high)):
            return [Finding("info", name, text + ". Too noisy for a conclusion", numbers)]
        if high.mean - low.mean > _ALARM * error + 1e-6 * high.mean:
            text += ". They can show different items, or the propensities of one are wrong"
            return [Finding("warning", name, text, numbers)]
        return [Finding("info", name, text, numbers)]

    def _target_mass(self) -> list[Finding]:
        weight = self._sums.weight
        if weight.count == 0:
            return []
        lost = 1.0 - weight.mean
        text = (
            f"mean weight of the target policy is {weight.mean:.4g} (standard error "
            f"{weight.std_error:.2g}), so {max(lost, 0.0):.1%} of its mass is on items "
            "without support in the log"
        )
        numbers = {"mean": weight.mean, "std_error": weight.std_error, "without_support": lost}
        if weight.too_noisy(1.0):
            return [Finding("info", "target", text + ": too noisy for a conclusion", numbers)]
        slack = _ALARM * weight.std_error + 1e-6
        if weight.mean > 1.0 + slack:
            return [
                Finding("error", "target", text + ": above 1, propensities are too small", numbers)
            ]
        level: Level = "warning" if lost > slack else "info"
        return [Finding(level, "target", text, numbers)]

    def _inverse_mean(self, policy: str, inverse: Moments) -> Finding:
        n_items = self._num_items
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
                "info", name, text + ": too noisy for a conclusion about the propensities", numbers
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
                text + ": the logging policy shows only a part of the catalogue, or propensities "
                "are too large",
                numbers,
            )
        return Finding("info", name, text + ": consistent", numbers)

    def _coverage(self) -> Finding:
        shown = len(self._sums.shown)
        share = shown / self._num_items
        return Finding(
            "info" if share > 0.5 else "warning",
            "coverage",
            f"{shown:,} of {self._num_items:,} items are shown at least once "
            f"({share:.1%})" + ("" if share > 0.5 else "; nothing is known of the others"),
            {"shown": shown, "items": self._num_items},
        )

    def _constant_columns(self) -> list[Finding]:
        return [
            Finding("warning", "constant", f"feature '{name}' has one value in every row")
            for name, seen in self._sums.values.items()
            if len(seen) == 1 and self._sums.rows > 1
        ]

    def _repeated_rounds(self) -> list[Finding]:
        pairs = self._sums.pairs
        twice = 0 if pairs is None else pairs.count()
        if pairs is None or twice == 0:
            return []
        return [
            Finding(
                "error",
                "repeats",
                f"{'about ' if pairs.shift else ''}{twice:,} rows repeat a (round, position) "
                "that another row has",
                {"rows": twice},
            )
        ]
