"""Retrieval from an export: contexts in, items with scores or propensities out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.config import ServingConfig
from offtower.config.serving import parse_serving
from offtower.data.columns import Column
from offtower.errors import (
    ConfigError,
    DataError,
    NoEligibleItemsError,
    OfftowerError,
    RunError,
)
from offtower.paths import safe_relative
from offtower.retrieval.cell_sampling import ItemSample
from offtower.retrieval.cells import Cells
from offtower.retrieval.eligible import open_eligible
from offtower.retrieval.eligible_search import ContextSets, RowSets, search_among
from offtower.retrieval.exact import exact_top_k
from offtower.retrieval.index import AnnIndex, open_index
from offtower.retrieval.item_ids import Filter, ItemIds
from offtower.retrieval.manifest import (
    FILE,
    Verify,
    find_version,
    logged_name,
    read_manifest,
    verify_files,
)
from offtower.retrieval.new_items import load_new_items
from offtower.retrieval.propensity_sampler import Mode, PropensitySampler
from offtower.retrieval.results import OnEmpty, SampleResult, SearchResult, padded
from offtower.retrieval.tower import ContextTower
from offtower.retrieval.vectors import load_ids, load_scale, load_vectors

IntArray = NDArray[np.int64]
_ATTEMPTS = 100
"""How often opening starts again because the export was replaced meanwhile."""


class Retriever:
    """Search and sample one version of an export, without training code and without pickles.

    `open` opens or maps all files. Later exports may replace the version and remove its files; the
    retriever keeps answering from them.
    """

    def __init__(
        self,
        directory: Path,
        manifest: dict[str, Any],
        trust_code: Collection[str] = (),
        serving: ServingConfig | None = None,
    ) -> None:
        self.directory, self.manifest = directory, manifest
        self.version = str(manifest["version"])
        exported = parse_serving(manifest["serving"], f"'{directory / FILE}': serving")
        self.serving = serving or exported
        self.policy_name = logged_name(self.version, exported, self.serving)
        facts = manifest["vectors"]
        self.num_items = int(facts["count"])
        self.tower = ContextTower.load(directory / "context_tower", self.version, trust_code)
        if self.tower.query_dim != facts["dim"]:
            raise RunError(
                f"the context tower of '{directory}' gives {self.tower.query_dim} numbers, the "
                f"items have {facts['dim']}; export again"
            )
        # Exports of format 2 have one file.
        names = facts["files"] if "files" in facts else [facts["file"]]
        files = [directory / safe_relative(name, directory / FILE, RunError) for name in names]
        self.vectors = load_vectors(files, self.num_items, facts["dim"], facts["dtype"])
        self.scale: NDArray[np.float32] | None = None
        if facts["dtype"] == "int8":
            self.scale = load_scale(directory / "scale.npy", facts["dim"])
        self.item_ids = load_ids(directory / "ids.arrow", self.num_items)
        self._ids = ItemIds(self.item_ids, text=bool(facts["text_ids"]))
        self.eligible = open_eligible(directory, manifest, self.item_ids)
        """Which items each context may be shown; None where every item may."""
        self.index: AnnIndex | None = None
        if manifest["index"] is not None:
            self.index = open_index(directory / "index", self.version, self.vectors, self.scale)
        self._new: NDArray[np.bool_] | None = None
        if self.serving.new_items is not None:
            self._new = load_new_items(directory, exported, self.serving)
        self._cells: Cells | None = None
        if manifest["cells"] is not None:
            self._cells = Cells.load(directory / "cells")
            if self._cells.vectors.shape != (self.num_items, self.tower.query_dim):
                raise RunError(
                    f"the cells of '{directory}' hold {self._cells.vectors.shape} numbers, the "
                    f"export has {(self.num_items, self.tower.query_dim)}; export again"
                )
        self._row_sets: RowSets | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        verify: Verify = "auto",
        index: bool = True,
        trust_code: Collection[str] = (),
        serving: ServingConfig | None = None,
    ) -> Retriever:
        """Open the current export of a run, or the version at `path`.

        Starts again with the new version where another export replaces the current one meanwhile.

        Args:
            path: a run directory, its export folder, or a version's folder.
            verify: "full" compares checksums of all files, "size" their sizes; "auto" is full for
                exports of up to 4 GiB.
            index: False searches exactly even if there is an index.
            trust_code: import paths of code that the export may name, as in `load_policy`.
            serving: serve otherwise than the run's configuration said when it was exported; such a
                log is of another policy than the run's.

        Raises:
            UntrustedCodeError: the export names other code.
            RunError: there is no export, files are missing or damaged, or tower, items and index
                belong to different versions.
            MissingExtraError: there is an index and FAISS is not installed.
        """
        for _ in range(_ATTEMPTS):
            directory = find_version(path)
            try:
                return cls._open_version(directory, verify, index, trust_code, serving)
            except OfftowerError:
                if find_version(path) == directory:
                    raise
        raise RunError(f"the export at '{path}' is replaced faster than it can be opened")

    @classmethod
    def _open_version(
        cls,
        directory: Path,
        verify: Verify,
        index: bool,
        trust_code: Collection[str],
        serving: ServingConfig | None,
    ) -> Retriever:
        manifest = read_manifest(directory)
        try:
            verify_files(directory, manifest, verify)
            if not index:
                manifest = {**manifest, "index": None}
            return cls(directory, manifest, trust_code, serving)
        except OSError as error:
            raise RunError(f"the export at '{directory}' cannot be read: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(f"'{directory / FILE}' is damaged: {error!r}; export again") from error

    @property
    def cells(self) -> Cells:
        """The partitioned catalogue that `sample` draws from.

        Raises:
            RunError: the export was made without sampling.
        """
        if self._cells is None:
            raise RunError(
                f"the export at '{self.directory}' was made without sampling; export again with it"
            )
        return self._cells

    def embed(self, contexts: pa.Table) -> NDArray[np.float32]:
        """Embed n contexts as (n, D) queries.

        Raises:
            DataError: a column is missing, or a query is not finite.
        """
        columns = self.tower.encoding.columns
        for name in columns:
            if name not in contexts.column_names:
                raise DataError(
                    f"the contexts have no column '{name}'; the policy needs " + ", ".join(columns)
                )
        queries = self.tower.embed(contexts)
        bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
        if bad.size:
            raise DataError(
                f"context {bad[0]} has no finite embedding: "
                + _unusable_feature(self.tower, contexts, int(bad[0]))
            )
        return queries

    def search(
        self,
        contexts: pa.Table,
        k: int = 100,
        *,
        exclude: Filter | None = None,
        exact: bool = False,
        at: datetime | None = None,
        on_empty: OnEmpty = "error",
    ) -> SearchResult:
        """Find the k items of largest logit among those that each context may be shown.

        Args:
            contexts: n rows with the context columns, and those that the log schema's section
                `eligible` reads.
            exclude: ids that must not be returned; unknown ids are ignored.
            exact: score every item even if there is an index.
            at: time of serving, as for `EligibleItems.of_contexts`.
            on_empty: of contexts that the section `eligible` leaves no item.

        Raises:
            ConfigError: k is not in [1, N].
            NoEligibleItemsError: see `on_empty`.
            DataError: see `embed` and `EligibleItems.of_contexts`.
        """
        self._check_k(k)
        queries = self.embed(contexts)
        excluded = self._ids.excluded(exclude, len(queries))
        if self.eligible is not None:
            rows = self.eligible.of_contexts(contexts, at=at, allow_empty=on_empty == "skip")
            sets = ContextSets(rows, excluded)
            index = None if exact else self.index
            score, item = search_among(queries, k, sets, self.vectors, self.scale, index)
            return self._result(score, item, [np.zeros(0, dtype=np.int64)] * len(queries), k)
        # Search deeper by the number of items that the filter may remove.
        deeper = min(self.num_items, k + max((len(h) for h in excluded), default=0))
        if exact or self.index is None:
            score, item = exact_top_k(queries, self.vectors, deeper, self.scale)
        else:
            score, item = self.index.search(queries, deeper)
        return self._result(score, item, excluded, k)

    def _result(
        self, score: NDArray[np.float32], item: IntArray, excluded: list[IntArray], k: int
    ) -> SearchResult:
        items, scores = [], []
        for row in range(len(item)):
            keep = (item[row] >= 0) & ~np.isin(item[row], excluded[row])
            items.append(item[row][keep][:k])
            scores.append(score[row][keep][:k])
        return SearchResult([self.ids_of(found) for found in items], items, scores)

    def sample(
        self,
        contexts: pa.Table,
        k: int | None = None,
        *,
        slate: bool = True,
        mode: Mode = "softmax",
        exclude: Filter | None = None,
        relative_error: float = 0.002,
        seed: int | np.random.Generator | None = None,
        at: datetime | None = None,
        on_empty: OnEmpty = "error",
    ) -> SampleResult:
        """Draw k items for each context from the served policy, with their propensities.

        A slate is shorter where filters leave fewer than k items; it then shows all of them.

        `Retriever.serving` says how the policy is served. In mode top_k these are the k best items,
        with a propensity of 1, found by the index; mode "exact" scores every item.

        Args:
            contexts: n rows with the context columns.
            k: positions of a slate without replacement, or independent draws; None is serving.k.
            slate: False draws independently.
            mode: "softmax", "cells" or "exact"; see `retrieval.propensity_sampler`.
            exclude: ids that must not be drawn; propensities are renormalized over the others.
            relative_error: target standard error of "softmax", as a share of pscore.
            seed: seed or generator; None takes fresh randomness.
            at: time of serving; only items that a context may be shown then are drawn.
            on_empty: of contexts that may be shown no item.

        Raises:
            ConfigError: k, mode or relative_error is out of range.
            NoEligibleItemsError: see `on_empty`.
            DataError: serving.top leaves fewer than k items, or see `embed`.
            RunError: the export was made without sampling.
        """
        k = self.serving.k if k is None else k
        self._check_k(k)
        if self.serving.mode == "top_k":
            if not slate and k > 1:
                raise ConfigError(
                    "serving.mode top_k shows the k best items; it has no independent draws (slate)"
                )
            return self._show_best(contexts, k, mode, exclude, at, on_empty)
        queries, rows = self.embed(contexts), None
        if self.eligible is not None:
            rows = self.eligible.of_contexts(contexts, at=at, allow_empty=on_empty == "skip")
        sets = ContextSets(rows, self._ids.excluded(exclude, len(queries)))
        if self._row_sets is None:
            self._row_sets = RowSets(self.cells)
        sampler = PropensitySampler(
            self.cells, relative_error=relative_error, serving=self.serving, new=self._new
        )
        rng = np.random.default_rng(seed)
        draw = sampler.slate if slate else sampler.draw
        drawn: list[ItemSample | None] = []
        for query, (skip, among) in zip(queries, self._row_sets.of(sets), strict=True):
            try:
                drawn.append(draw(query, rng, size=k, mode=mode, exclude=skip, among=among))
            except NoEligibleItemsError as error:
                if on_empty == "error":
                    raise NoEligibleItemsError(f"context {len(drawn)}: {error}") from error
                drawn.append(None)
            except DataError as error:
                raise DataError(f"context {len(drawn)}: {error}") from error
        item = padded([None if d is None else d.item for d in drawn], k, -1)
        return SampleResult(
            [self.ids_of(row[row >= 0]) for row in item],
            item,
            padded([None if d is None else d.pscore for d in drawn], k, np.nan),
            padded([None if d is None else d.relative_error for d in drawn], k, np.nan),
            padded([None if d is None else d.conditional_pscore for d in drawn], k, np.nan),
            slate,
            self.version,
            mode,
            self.policy_name,
            None if exclude is None else sets.exclude,
        )

    def _show_best(
        self,
        contexts: pa.Table,
        k: int,
        mode: Mode,
        exclude: Filter | None,
        at: datetime | None,
        on_empty: OnEmpty,
    ) -> SampleResult:
        """The k best items of each context, each with probability 1."""
        find = partial(self.search, k=k, at=at, on_empty=on_empty)
        found = find(contexts, exclude=exclude, exact=mode == "exact").item
        excluded = self._ids.excluded(exclude, len(found))
        # An index may find fewer items than there are.
        short = [row for row, items in enumerate(found) if len(items) < k]
        if short and self.index is not None and mode != "exact":
            left_out = [self.ids_of(excluded[row]) for row in short]
            again = find(contexts.take(pa.array(short)), exclude=left_out, exact=True)
            for row, items in zip(short, again.item, strict=True):
                found[row] = items
        empty = [row for row in short if not len(found[row])]
        if empty and on_empty == "error":
            raise NoEligibleItemsError(
                f"context {empty[0]}: filters leave 0 of {self.num_items:,} items; leave this "
                "context out"
            )
        item = padded(found, k, -1)
        one = np.where(item >= 0, 1.0, np.nan)
        return SampleResult(
            [self.ids_of(items) for items in found],
            item,
            one,
            one - 1.0,
            one,
            True,
            self.version,
            mode,
            self.policy_name,
            None if exclude is None else excluded,
        )

    def ids_of(self, item: IntArray) -> list[Any]:
        """Return the ids of item numbers."""
        return self._ids.of(item)

    def numbers_of(self, ids: Column | Sequence[Any]) -> IntArray:
        """Return the (n,) item numbers of ids; -1 for unknown ids.

        Raises:
            DataError: ids are numbers and those of the export are text, or the reverse.
        """
        return self._ids.numbers(ids)

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.num_items:
            raise ConfigError(f"k must lie in [1, {self.num_items}], the number of items, got {k}")


def _unusable_feature(tower: ContextTower, contexts: pa.Table, row: int) -> str:
    """Name the first feature of the row that is null, NaN or infinite."""
    for spec in tower.encoding.specs:
        values = tower.encoding.only(spec.name).encode(contexts.slice(row, 1))[spec.name]
        if isinstance(values, np.ndarray) and not np.isfinite(values).all():
            given = contexts[spec.source][row].as_py()
            return (
                f"feature '{spec.name}' is {'null' if given is None else given}; give it a finite "
                "number"
            )
    return "a weight of the context tower is not finite; export the run again"
