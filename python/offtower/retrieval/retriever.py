"""What a serving team holds: contexts in, items with scores or with propensities out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.columns import Column
from offtower.errors import ConfigError, DataError, RunError
from offtower.retrieval.cells import Cells
from offtower.retrieval.exact import exact_top_k
from offtower.retrieval.index import AnnIndex, open_index
from offtower.retrieval.manifest import Verify, find_version, read_manifest, verify_files
from offtower.retrieval.propensity_sampler import ItemSample, Mode, PropensitySampler
from offtower.retrieval.tower import ContextTower
from offtower.retrieval.vectors import id_keys, load_ids, load_vectors

IntArray = NDArray[np.int64]
Filter = Sequence[Any] | Sequence[Sequence[Any]] | NDArray[Any]
"""Item ids that must not be shown: one list for all contexts, or one for each."""


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The k best items of n contexts."""

    item_id: list[list[Any]]
    """By context, best first; shorter than k where filters or the index left fewer."""
    item: list[IntArray]
    """By context, item numbers in the catalogue."""
    score: list[NDArray[np.float32]]
    """By context, logits <u, v_a> / temperature + b_a."""


@dataclass(frozen=True, eq=False)
class SampleResult:
    """Drawn items of n contexts, k each."""

    item_id: list[list[Any]]
    item: IntArray
    """(n, k) item numbers."""
    pscore: NDArray[np.float64]
    """(n, k); in a slate each position's is given the positions before it."""
    relative_error: NDArray[np.float64]
    """(n, k) standard error of pscore as a share of it; 0 where it is exact."""
    conditional_pscore: NDArray[np.float64]
    """(n, k) probability given what was looked at; see `retrieval.propensity_sampler`."""
    slate: bool
    version: str
    mode: Mode


class Retriever:
    """Searches and samples an export, without training code and without pickles.

    Args: see `open`, which makes one.
    """

    def __init__(
        self, directory: Path, manifest: dict[str, Any], trust_code: Collection[str] = ()
    ) -> None:
        self.directory, self.manifest = directory, manifest
        self.version = str(manifest["version"])
        facts = manifest["vectors"]
        self.num_items = int(facts["count"])
        self.tower = ContextTower.load(directory / "context_tower", self.version, trust_code)
        if self.tower.query_dim != facts["dim"]:
            raise RunError(
                f"the context tower of '{directory}' gives {self.tower.query_dim} numbers, the "
                f"items have {facts['dim']}; export again"
            )
        self.vectors = load_vectors(
            directory / facts["file"], self.num_items, facts["dim"], facts["dtype"]
        )
        self.scale: NDArray[np.float32] | None = None
        if facts["dtype"] == "int8":
            self.scale = np.load(directory / "scale.npy", allow_pickle=False)
        self.item_ids = load_ids(directory / "ids.arrow", self.num_items)
        self.index: AnnIndex | None = None
        if manifest["index"] is not None:
            self.index = open_index(directory / "index", self.version, self.vectors, self.scale)
        self._cells: Cells | None = None
        self._keys: tuple[NDArray[np.uint64], IntArray] | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        verify: Verify = "auto",
        index: bool = True,
        trust_code: Collection[str] = (),
    ) -> Retriever:
        """Open the current export of a run, or the version at `path`.

        Args:
            path: a run directory, its export folder, or a version's folder.
            verify: "full" reads every byte and compares checksums, "size" compares sizes; "auto"
                is full for exports of up to 4 GiB.
            index: False searches exactly though there is an index.
            trust_code: import paths of code that the export may name, as in `load_policy`.

        Raises:
            RunError: nothing is there, files are missing or damaged, or tower, items and index are
                not of one version.
            MissingExtraError: there is an index and FAISS is not installed.
        """
        directory = find_version(path)
        manifest = read_manifest(directory)
        verify_files(directory, manifest, verify)
        return cls(directory, manifest if index else {**manifest, "index": None}, trust_code)

    @property
    def cells(self) -> Cells:
        """What sampling needs; loaded at first use.

        Raises:
            RunError: the export was made without sampling.
        """
        if self._cells is None:
            if self.manifest["cells"] is None:
                raise RunError(
                    f"the export at '{self.directory}' was made without sampling; export again "
                    "with it"
                )
            self._cells = Cells.load(self.directory / "cells")
            if self._cells.vectors.shape != (self.num_items, self.tower.query_dim):
                raise RunError(
                    f"the cells of '{self.directory}' hold {self._cells.vectors.shape} numbers, "
                    f"the export has {(self.num_items, self.tower.query_dim)}; export again"
                )
        return self._cells

    def embed(self, contexts: pa.Table) -> NDArray[np.float32]:
        """Context columns of n rows -> (n, D) queries.

        Raises:
            DataError: a column is missing, or a query is not finite.
        """
        for spec in self.tower.encoding.specs:
            if spec.source not in contexts.column_names:
                raise DataError(
                    f"the contexts have no column '{spec.source}'; the policy needs "
                    + ", ".join(s.source for s in self.tower.encoding.specs)
                )
        queries = self.tower.embed(contexts)
        bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
        if bad.size:
            raise DataError(
                f"context {bad[0]} has no finite embedding: a null, NaN or infinite feature?"
            )
        return queries

    def search(
        self,
        contexts: pa.Table,
        k: int = 100,
        *,
        exclude: Filter | None = None,
        exact: bool = False,
    ) -> SearchResult:
        """The k items of largest logit.

        Args:
            contexts: n rows with the context columns.
            exclude: ids that must not be shown; unknown ids are ignored.
            exact: score every item though there is an index.

        Raises:
            ConfigError: k is not in [1, N].
            DataError: see `embed`.
        """
        self._check_k(k)
        queries = self.embed(contexts)
        hidden = self._hidden(exclude, len(queries))
        # Filters cost rank: look as much deeper as items may drop out.
        deeper = min(self.num_items, k + max((len(h) for h in hidden), default=0))
        if exact or self.index is None:
            score, item = exact_top_k(queries, self.vectors, deeper, self.scale)
        else:
            score, item = self.index.search(queries, deeper)
        items, scores = [], []
        for row in range(len(queries)):
            keep = (item[row] >= 0) & ~np.isin(item[row], hidden[row])
            items.append(item[row][keep][:k])
            scores.append(score[row][keep][:k])
        return SearchResult([self.ids_of(found) for found in items], items, scores)

    def sample(
        self,
        contexts: pa.Table,
        k: int = 1,
        *,
        slate: bool = True,
        mode: Mode = "softmax",
        exclude: Filter | None = None,
        relative_error: float = 0.002,
        seed: int | np.random.Generator | None = None,
    ) -> SampleResult:
        """Draw k items for each context, with their propensities.

        Args:
            contexts: n rows with the context columns.
            k: positions of a slate without replacement, or independent draws.
            slate: False draws independently.
            mode: "softmax", "cells" or "exact"; see `retrieval.propensity_sampler`.
            exclude: ids that must not be shown; propensities are renormalised over the others.
            relative_error: standard error that "softmax" aims at, as a share of pscore.
            seed: repeats draws; None takes fresh randomness, a generator goes on from where it is.

        Raises:
            ConfigError: k, mode or relative_error is out of range.
            DataError: filters leave fewer than k items, or see `embed`.
            RunError: the export was made without sampling.
        """
        self._check_k(k)
        queries = self.embed(contexts)
        hidden = self._hidden(exclude, len(queries))
        sampler = PropensitySampler(self.cells, relative_error=relative_error)
        rng = np.random.default_rng(seed)
        draw = sampler.slate if slate else sampler.draw
        drawn: list[ItemSample] = [
            draw(query, rng, size=k, mode=mode, exclude=skip)
            for query, skip in zip(queries, hidden, strict=True)
        ]

        def stacked(name: str) -> Any:
            return np.stack([getattr(d, name) for d in drawn]) if drawn else np.zeros((0, k))

        item = stacked("item").astype(np.int64)
        return SampleResult(
            [self.ids_of(row) for row in item],
            item,
            stacked("pscore"),
            stacked("relative_error"),
            stacked("conditional_pscore"),
            slate,
            self.version,
            mode,
        )

    def ids_of(self, item: IntArray) -> list[Any]:
        """Ids of item numbers."""
        ids: list[Any] = self.item_ids.take(pa.array(item)).to_pylist()
        return ids

    def numbers_of(self, ids: Column | Sequence[Any]) -> IntArray:
        """(n,) item numbers of ids; -1 where the export has no such item.

        Raises:
            DataError: ids are numbers where the export has text, or the other way round.
        """
        text = bool(self.manifest["vectors"]["text_ids"])
        try:
            values = pa.array(list(ids), pa.string() if text else pa.int64())
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise DataError(
                f"item ids of this export are {'text' if text else 'integers'}: {error}"
            ) from error
        if self._keys is None:
            # Sorted 64-bit keys: 16 bytes an item, made when a filter first asks.
            keys = id_keys(self.item_ids.combine_chunks())
            order = np.argsort(keys)
            self._keys = keys[order], order
        ordered, order = self._keys
        wanted = id_keys(values)
        place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        return np.where(ordered[place] == wanted, order[place], -1)

    def _hidden(self, exclude: Filter | None, n: int) -> list[IntArray]:
        """Item numbers to leave out, by context."""
        nothing = np.zeros(0, dtype=np.int64)
        if exclude is None or len(exclude) == 0:
            return [nothing] * n
        if not isinstance(exclude[0], list | tuple | set | np.ndarray):
            numbers = self.numbers_of(exclude)  # type: ignore[arg-type]
            return [np.unique(numbers[numbers >= 0])] * n
        if len(exclude) != n:
            raise DataError(f"{len(exclude)} lists of ids to exclude for {n} contexts")
        found = [self.numbers_of(list(ids)) if len(ids) else nothing for ids in exclude]
        return [np.unique(numbers[numbers >= 0]) for numbers in found]

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.num_items:
            raise ConfigError(f"k must lie in [1, {self.num_items}], the number of items, got {k}")
