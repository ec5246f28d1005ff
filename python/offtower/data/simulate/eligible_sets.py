"""Eligible items of a simulated world, in the forms of the log schema's section `eligible`.

- regions: each row has a region, each item the regions that it is available in, every region with
  probability 1/2 and at least one.
- days: each item is listed for that many days within a period of 30; each row has a time.
- seen: each row has a list of items that its user has seen, among popular ones, and that may not be
  shown again.
- candidates: each row has a list of the only items that may be shown.

The first K items of a region's own block of the catalogue are always eligible in it, so that every
row has enough items for a slate of K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import as_array
from offtower.data.eligible_schema import AttributeForm, EligibleSchema, IntervalForm, ListForm
from offtower.errors import ConfigError, DataError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

REGION, REGIONS = "region", "regions"
LISTED, DELISTED = "listed_at", "delisted_at"
SEEN, CANDIDATES = "seen", "candidates"

PERIOD_DAYS = 30
START = np.datetime64("2026-01-01T00:00:00", "us")

_POPULAR = 4
"""Seen items are drawn from this many times as many popular ones."""
_ALWAYS = (np.datetime64("2000-01-01", "us"), np.datetime64("2100-01-01", "us"))


@dataclass(frozen=True)
class EligibilitySettings:
    """Which items may be shown in a simulated world; forms that are None do not restrict.

    Attributes:
        regions: number of regions.
        days: days for which an item is listed.
        seen: items that a user has seen.
        candidates: items that may be shown.
        everywhere: percentage of the items that all regions have, where the others are in one
            region each; None gives each region half of the items, drawn independently.

    Raises:
        ConfigError: no form is given, a number is below 1, or `everywhere` is above 100 or without
            regions.
    """

    regions: int | None = None
    days: int | None = None
    seen: int | None = None
    candidates: int | None = None
    everywhere: int | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        forms = [name for name in given if name != "everywhere"]
        if all(given[name] is None for name in forms):
            raise ConfigError(f"eligible items need at least one of {', '.join(forms)}")
        if self.everywhere is not None and (self.regions is None or self.everywhere > 100):
            raise ConfigError(
                "everywhere is a percentage of the items of regions: give regions too, and at most "
                f"100, not {self.everywhere}"
            )
        for name, number in given.items():
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1, but is {number}")


def parse_eligibility(texts: Sequence[str]) -> EligibilitySettings:
    """Read settings such as "regions=20".

    Raises:
        ConfigError: a form is unknown or named twice, or its number is not one.
    """
    known = [f.name for f in fields(EligibilitySettings)]
    found: dict[str, int] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in known or name in found or not number.isdecimal():
            raise ConfigError(
                f"eligible items '{text}': give each of {', '.join(known)} at most once, with a "
                "number, such as regions=20"
            )
        found[name] = int(number)
    return EligibilitySettings(**found)


class EligibleSets:
    """The forms of one world: its item columns, draws of row columns, and exact eligible sets.

    Args:
        settings: which forms there are.
        item_ids: (N,) ids of the catalogue.
        popularity: (N,) by which seen items are chosen.
        least: K, number of items that every row may be shown at least.
        rng: source of the items' regions and times.

    Raises:
        ConfigError: there are fewer than K items.
    """

    def __init__(
        self,
        settings: EligibilitySettings,
        item_ids: pa.Array,
        popularity: NDArray[np.float64],
        least: int,
        rng: np.random.Generator,
    ) -> None:
        n = len(item_ids)
        if n < least:
            raise ConfigError(f"slates of {least} need as many items, but there are {n}")
        self.settings, self.item_ids, self.n_items = settings, item_ids, n
        regions = settings.regions or 1
        block = np.arange(regions)[:, None] * least + np.arange(least)
        self._home: IntArray = np.sort(block % n, axis=1)
        """(R, K) items that are always eligible in a region."""
        self._available = np.ones((regions, n), dtype=bool)
        if settings.regions is not None:
            if settings.everywhere is None:
                self._available = rng.random((regions, n)) < 0.5
            else:
                self._available[:] = rng.random(n) < settings.everywhere / 100.0
            self._available[rng.integers(regions, size=n), np.arange(n)] = True
            self._available[np.arange(regions)[:, None], self._home] = True
        self._first = np.full(n, _ALWAYS[0])
        self._last = np.full(n, _ALWAYS[1])
        if settings.days is not None:
            first = rng.integers(-settings.days + 1, PERIOD_DAYS, size=n)
            limited = np.ones(n, dtype=bool)
            limited[self._home.reshape(-1)] = False
            from_day = START + first * np.timedelta64(1, "D")
            self._first[limited] = from_day[limited]
            until = from_day + np.timedelta64(settings.days, "D")
            self._last[limited] = until[limited]
        popular = np.argsort(-popularity, kind="stable")
        self._popular: IntArray = popular[: max(1, _POPULAR * (settings.seen or 1))]

    @property
    def section(self) -> EligibleSchema:
        """The section `eligible` of the log schema."""
        given = self.settings
        return EligibleSchema(
            attribute=() if given.regions is None else (AttributeForm(REGIONS, REGION),),
            interval=None if given.days is None else IntervalForm(LISTED, DELISTED),
            exclude=None if given.seen is None else ListForm(SEEN),
            candidates=None if given.candidates is None else ListForm(CANDIDATES),
        )

    def item_columns(self) -> dict[str, pa.Array]:
        """Return the columns of the catalogue that the forms read."""
        columns: dict[str, pa.Array] = {}
        if self.settings.regions is not None:
            item, region = np.nonzero(self._available.T)
            offsets = np.concatenate([[0], np.cumsum(np.bincount(item, minlength=self.n_items))])
            columns[REGIONS] = pa.ListArray.from_arrays(
                pa.array(offsets.astype(np.int32)), self._region_names.take(pa.array(region))
            )
        if self.settings.days is not None:
            columns[LISTED], columns[DELISTED] = pa.array(self._first), pa.array(self._last)
        return columns

    def row_columns(
        self, time: NDArray[np.datetime64], rng: np.random.Generator
    ) -> dict[str, pa.Array]:
        """Draw the columns of n rows, whose times are (n,) `time`."""
        settings, n = self.settings, len(time)
        region = rng.integers(len(self._home), size=n)
        columns: dict[str, pa.Array] = {}
        if settings.regions is not None:
            columns[REGION] = self._region_names.take(pa.array(region))
        candidates: list[IntArray] | None = None
        if settings.candidates is not None:
            candidates = self._candidates(settings.candidates, region, time, rng)
            columns[CANDIDATES] = self._lists(candidates)
        if settings.seen is not None:
            seen = []
            for row, home in enumerate(self._home[region]):
                pool = self._popular if candidates is None else candidates[row]
                pool = pool[~np.isin(pool, home)]
                seen.append(np.sort(rng.permutation(pool)[: settings.seen]))
            columns[SEEN] = self._lists(seen)
        return columns

    def mask(self, table: pa.Table) -> BoolArray:
        """Compute (n, N), whether an item is eligible in a row of `table`.

        Raises:
            DataError: a column holds a region or an item that this world does not have.
        """
        settings, n = self.settings, table.num_rows
        found = np.ones((n, self.n_items), dtype=bool)
        if settings.regions is not None:
            region = pc.index_in(as_array(table.column(REGION)), value_set=self._region_names)
            if region.null_count:
                raise DataError(f"column '{REGION}' holds a region that this world does not have")
            found &= self._available[region.to_numpy()]
        if settings.days is not None:
            time = as_array(table.column("timestamp")).to_numpy(zero_copy_only=False)
            time = time.astype("datetime64[us]")[:, None]
            found &= (self._first <= time) & (time < self._last)
        if settings.candidates is not None:
            listed = np.zeros_like(found)
            listed[self._entries(table, CANDIDATES)] = True
            found &= listed
        if settings.seen is not None:
            found[self._entries(table, SEEN)] = False
        return found

    @property
    def _region_names(self) -> pa.Array:
        return pa.array([f"region-{number:02d}" for number in range(len(self._home))])

    def _candidates(
        self,
        count: int,
        region: IntArray,
        time: NDArray[np.datetime64],
        rng: np.random.Generator,
    ) -> list[IntArray]:
        """Items of each row: those always eligible, then others that are, `count` in all."""
        drawn = rng.integers(self.n_items, size=(len(region), 4 * count + 8))
        at = time[:, None]
        opened = self._available[region[:, None], drawn]
        opened &= (self._first[drawn] <= at) & (at < self._last[drawn])
        lists = []
        for home, items, eligible in zip(self._home[region], drawn, opened, strict=True):
            others = items[eligible]
            _, index = np.unique(others, return_index=True)
            others = others[np.sort(index)]
            others = others[~np.isin(others, home)][: max(0, count - len(home))]
            lists.append(np.sort(np.concatenate([home, others])))
        return lists

    def _lists(self, items: list[IntArray]) -> pa.ListArray:
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in items])])
        numbers = np.concatenate(items) if items else np.zeros(0, dtype=np.int64)
        ids = self.item_ids.take(pa.array(numbers))
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), ids)

    def _entries(self, table: pa.Table, name: str) -> tuple[IntArray, IntArray]:
        """(row, item) of each entry of a list column."""
        column = as_array(table.column(name))
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
        item = pc.index_in(pc.list_flatten(column), value_set=self.item_ids)
        if item.null_count:
            raise DataError(f"column '{name}' holds an item that this world does not have")
        return np.repeat(np.arange(len(lengths)), lengths), item.to_numpy().astype(np.int64)
