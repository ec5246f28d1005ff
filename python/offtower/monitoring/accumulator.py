"""One pass over a served log: sums in bounded memory, whatever its number of rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.config import MonitorConfig
from offtower.data.catalogue import Catalogue
from offtower.data.check import first_bad_rows
from offtower.data.columns import hashed, splitmix64
from offtower.data.durations import parse_duration
from offtower.data.findings.base import LogPart
from offtower.data.findings.sketches import DuplicateCount, ItemSet
from offtower.data.log import TableOrigin
from offtower.data.profile import UnitSample
from offtower.data.round_tables import whole_rounds
from offtower.data.rows import EncodedRows, encode_rows
from offtower.data.schema import LogSchema
from offtower.data.unknown import UnknownValues
from offtower.errors import DataError
from offtower.evaluation.intervals.statistics import Statistics, collect
from offtower.evaluation.intervals.time_sums import DAY
from offtower.evaluation.rows import Array, EvaluationRows, IntArray
from offtower.evaluation.scoring.clock import LogClock
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.monitoring.days import DaySums, WeightSums

MOST_DAYS = 1000
UNKNOWN_ITEM = "an unknown item"
"""Problem of a row whose item the catalogue lacks, which is counted apart from bad rows."""
_DISTINCT = 65_536
"""Ids without an item that are counted exactly; beyond, the number is an estimate of 0.4 %."""
_EXAMPLES = 3
_UNEQUAL = 0.05
"""Relative distance of a logged propensity from the policy's that counts as another one."""
_BATCH_ROWS = 4096
_CALENDAR = (10**14, 10**16)
"""Microseconds since 1970 from 1973 to 2286."""


@dataclass(frozen=True)
class MonitorPlan:
    """What the rows are compared with.

    Attributes:
        schema: of the log. rows: of it. clock: of its times.
        scorer: the policy as it is served. own_logs: keys of the names of the run's exports.
        softer: the same policy at twice the temperature, whose weights have mean 1 too, and vary in
            a log of the policy itself; None for one that does not draw.
    """

    config: MonitorConfig
    schema: LogSchema
    rows: int
    clock: LogClock
    catalogue: Catalogue
    scorer: PolicyScorer
    own_logs: NDArray[np.uint64]
    softer: PolicyScorer | None

    def day_of(self, time: IntArray) -> IntArray:
        """(n,) numbers of the days of times in microseconds, or in a unit of their own.

        Raises:
            DataError: the period is a duration and the times are no dates.
        """
        period = self.config.period
        if isinstance(period, str):
            if time.size and not _CALENDAR[0] <= int(np.median(time)) <= _CALENDAR[1]:
                raise DataError(
                    f"monitor.period is '{period}', but the log's timestamps are no dates (about "
                    f"{int(np.median(time)):,}): give a number in their unit "
                    "(--set monitor.period=1000)"
                )
            period = parse_duration(period, "monitor.period")
        return np.asarray(time // max(1, round(period)), dtype=np.int64)

    def day_name(self, number: int) -> str:
        """A day's first time as text."""
        period = self.config.period
        if not isinstance(period, str):
            return f"{number * max(1, round(period)):,}"
        width = parse_duration(period, "monitor.period")
        start = np.datetime64(number * width, "us")
        return str(start.astype("datetime64[D]" if width % DAY == 0 else "datetime64[m]"))


class MonitorAccumulator:
    """Sums over the rows so far.

    Attributes:
        rows, bad, unknown_rows: rows read, those that break the schema, and those whose item the
            catalogue lacks; the last two are left out of everything else.
        faults: bad values by (column, problem). examples: the first of them.
        items: shown items of the catalogue. unknown_ids: keys of the others, with examples.
        unknown: values that training did not see.
        sample: of the features.
        days: by number. rewards: by bin of time.
        softer: weights of the first rows of sampled units under the plan's softer policy.
        own, unequal: rows that the run's exports served whose weight is known, and those with
            another propensity than the policy's.
    """

    def __init__(self, plan: MonitorPlan) -> None:
        self._plan = plan
        encoding = plan.scorer.context_encoding
        self.rows = self.bad = self.unknown_rows = self.own = self.unequal = 0
        self.faults: Counter[tuple[str, str]] = Counter()
        self.examples: tuple[str, ...] = ()
        self.items = ItemSet.of(np.zeros(0, dtype=np.int64), plan.catalogue.num_items)
        self.unknown_ids = DuplicateCount.of(np.zeros(0, dtype=np.uint64), _DISTINCT)
        self.unknown_examples: tuple[str, ...] = ()
        self.unknown = UnknownValues()
        self.sample = UnitSample(encoding.specs)
        self.days: dict[int, DaySums] = {}
        self.rewards: Statistics | None = None
        self.softer: WeightSums | None = None
        share = plan.config.weight_rows / max(1, plan.rows)
        self._chosen = np.uint64(min(2**64 - 1, int(share * 2**64)))

    def add(self, table: pa.Table, origin: TableOrigin, first_row: int) -> None:
        """Add the rows of a row group.

        Raises:
            DataError: a column is missing or of a wrong type, or there are too many days.
        """
        plan, n = self._plan, table.num_rows
        self.rows += n
        good = self._good_rows(table, origin, first_row)
        row = first_row + np.flatnonzero(good)
        if not row.size:
            return
        table = table if good.all() else table.filter(pa.array(good))
        encoding = plan.scorer.context_encoding
        rows = encode_rows(table, plan.schema, plan.catalogue, encoding, first_row, row)
        self.items = self.items.merge(ItemSet.of(rows.action, plan.catalogue.num_items))
        self.unknown.add(encoding, rows.context, len(rows))
        self.unknown.add_missing(encoding, table)
        self.sample = self.sample.with_rows(table, plan.schema, row)
        self._add_units(rows)

    def _good_rows(self, table: pa.Table, origin: TableOrigin, first_row: int) -> NDArray[np.bool_]:
        plan = self._plan
        part = LogPart.of(table, plan.schema, plan.catalogue, origin, first_row)
        if not part.faults:
            return np.ones(table.num_rows, dtype=bool)
        unknown = np.zeros(table.num_rows, dtype=bool)
        others = []
        for fault in part.faults:
            if (fault.column, fault.problem) == (plan.schema.action, UNKNOWN_ITEM):
                unknown |= fault.mask
            else:
                others.append(fault)
        bad = np.zeros(table.num_rows, dtype=bool)
        for fault in others:
            bad |= fault.mask & ~unknown
            self.faults[fault.column, fault.problem] += int((fault.mask & ~unknown).sum())
        if len(self.examples) < _EXAMPLES:
            found = first_bad_rows(table, others, origin, first_row, _EXAMPLES)
            self.examples = (*self.examples, *map(str, found))[:_EXAMPLES]
        if unknown.any():
            ids = table.column(plan.schema.action).filter(pa.array(unknown))
            self.unknown_ids = self.unknown_ids.merge(DuplicateCount.of(hashed(ids), _DISTINCT))
            texts = (str(one) for one in ids.unique()[:_EXAMPLES].to_pylist())
            self.unknown_examples = tuple(dict.fromkeys([*self.unknown_examples, *texts]))
            self.unknown_examples = self.unknown_examples[:_EXAMPLES]
        self.bad += int(bad.sum())
        self.unknown_rows += int(unknown.sum())
        return ~whole_rounds(bad | unknown, table, plan.schema)

    def _add_units(self, rows: EncodedRows) -> None:
        """Add rewards and weights of the rows' rounds, or of each row where there are none."""
        plan = self._plan
        time = plan.clock.time(rows.timestamp)
        assert time is not None, "callers refuse logs without timestamps"
        first = _unit_starts(rows)
        counts = np.diff(np.append(first, len(rows)))
        reward = _means(rows.reward.astype(np.float64), first, counts)
        chosen = np.flatnonzero(splitmix64(rows.row[first].astype(np.uint64)) <= self._chosen)
        weight = self._weights(rows, first, counts, chosen)
        day = plan.day_of(time[first])
        for number in np.unique(day).tolist():
            here = day == number
            sums = DaySums.of(int(counts[here].sum()), reward[here], plan.schema.reward_range)
            if (weighed := here[chosen]).any():
                weights = WeightSums.of(weight[weighed], plan.config.max_weight)
                sums = replace(sums, weights=weights)
            before = self.days.get(number)
            self.days[number] = sums if before is None else before.merge(sums)
        if len(self.days) > MOST_DAYS:
            raise DataError(
                f"the log has more than {MOST_DAYS:,} days of monitor.period = "
                f"{plan.config.period}: set a longer one (--set monitor.period=7d), or check the "
                f"times in column '{plan.schema.timestamp}'"
            )
        units = EvaluationRows(np.ones_like(reward), reward, row=rows.row[first], time=time[first])
        sums_of_time = collect(reward[:, None], units, timed=True)
        self.rewards = sums_of_time if self.rewards is None else self.rewards.merge(sums_of_time)

    def _weights(
        self, rows: EncodedRows, first: IntArray, counts: IntArray, chosen: IntArray
    ) -> Array:
        """(m,) mean weights of the chosen units; counts propensities that are not the policy's."""
        found = [np.zeros(0)]
        at = 0
        while at < len(chosen):
            ends = np.cumsum(counts[chosen[at:]])
            step = max(1, int(np.searchsorted(ends, _BATCH_ROWS, side="right")))
            units = chosen[at : at + step]
            at += step
            taken = np.concatenate([np.arange(first[u], first[u] + counts[u]) for u in units])
            batch = rows.take(taken)
            weight = self._plan.scorer.score(batch).importance_weight
            if batch.behavior_policy is not None:
                own = np.isin(batch.behavior_policy, self._plan.own_logs)
                self.own += int(own.sum())
                self.unequal += int((np.abs(weight[own] - 1.0) > _UNEQUAL).sum())
            starts = np.cumsum(counts[units]) - counts[units]
            if self._plan.softer is not None:
                softer = self._plan.softer.score(batch).importance_weight[starts]
                sums = WeightSums.of(softer, self._plan.config.max_weight)
                self.softer = sums if self.softer is None else self.softer.merge(sums)
            found.append(_means(weight, starts, counts[units]))
        return np.concatenate(found)


def _unit_starts(rows: EncodedRows) -> IntArray:
    """First rows of the runs of one round id; every row where the log has no rounds."""
    if rows.round_id is None:
        return np.arange(len(rows))
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = rows.round_id[1:] != rows.round_id[:-1]
    return np.flatnonzero(begins)


def _means(values: Array, first: IntArray, counts: IntArray) -> Array:
    return np.asarray(np.add.reduceat(values, first) / counts, dtype=np.float64)
