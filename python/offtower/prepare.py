"""Opened logs, fitted encodings and facts about rewards, for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from offtower.ancestry import ROWS, EarlierRun, open_earlier_run
from offtower.checksums import (
    checked_directory,
    is_complete,
    read_json,
    verify_directory,
    write_checked_json,
)
from offtower.config import Config
from offtower.data.catalogue import Catalogue
from offtower.data.check import RowChecker
from offtower.data.encoded_cache import EncodedCache
from offtower.data.encoding import FeatureEncoding
from offtower.data.encoding_fit import EncodingSums
from offtower.data.extension import TableRows, load_rows, save_rows
from offtower.data.histories import HistoryBasis
from offtower.data.loading import Loader
from offtower.data.log import Log, ParquetLog
from offtower.data.order import EpochOrder
from offtower.data.profile import LogProfile, UnitSample
from offtower.data.reader import BatchReader, FoldOf, scan
from offtower.data.replay import ReplayLog, replay
from offtower.data.row_sketch import RowSketch
from offtower.data.rows import EncodedRows, row_weights
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.data.shared_windows import Exchange
from offtower.errors import ConfigError, RunError
from offtower.models.device_items import items_to_device
from offtower.models.items import DEFAULT_CHUNK, ItemFeatures
from offtower.progress import Progress
from offtower.seeds import derive_seed


@dataclass(frozen=True)
class LogFacts:
    """Facts from one pass over the training log."""

    rows: int
    binary_reward: bool
    mean_reward: float
    smallest_pscore: float | None
    mean_row_weight: float = 1.0
    """Of the rows' weights; 1 where they have none."""
    row_sketch: dict[str, str] | None = None
    """`RowSketch.to_dict` of the rows, and of those of the runs before, by which copies of them are
    found in other logs."""
    profile: dict[str, Any] | None = None
    """`LogProfile.to_dict` of the rows, with which `offtower monitor` compares later logs."""


@dataclass(frozen=True)
class ExtendedRows:
    """Where the rows of the tables come from in a run that goes on from an earlier one, by feature
    of the contexts and of the items."""

    context: Mapping[str, TableRows]
    item: Mapping[str, TableRows]

    @property
    def texts(self) -> Iterator[str]:
        """What became of each feature's values."""
        for side in (self.context, self.item):
            for name, rows in side.items():
                yield f"values of '{name}': {rows.text or 'none'}"


@dataclass(frozen=True)
class Encodings:
    """Encodings of both sides and facts about the log, from one pass over it."""

    facts: LogFacts
    context: FeatureEncoding
    item: FeatureEncoding
    rows: ExtendedRows | None = None
    """Of a run that goes on from an earlier one."""


@dataclass(frozen=True)
class PreparedData:
    """Opened logs and catalogue, and the encodings fitted on them."""

    train: Log
    validation: Log | None
    catalogue: Catalogue
    context_encoding: FeatureEncoding
    item_encoding: FeatureEncoding
    items: ItemFeatures
    facts: LogFacts
    quarantine: Path | None = None
    """Folder for bad rows, with data.on_bad_rows=quarantine."""
    rows: ExtendedRows | None = None
    """Of a run that goes on from an earlier one."""

    @property
    def device(self) -> torch.device:
        """The device of the item features, and so of the models that read them."""
        return self.items.device

    def to_device(self, device: torch.device, max_bytes: int | None = None) -> PreparedData:
        """The same data for models on `device`; `max_bytes` as for `items_to_device`."""
        return replace(self, items=items_to_device(self.items, device, max_bytes))

    def scan(
        self,
        batch_rows: int,
        part: Literal["train", "validation"] = "train",
        *,
        sketched: bool = False,
    ) -> Iterator[EncodedRows]:
        """Encoded rows of one log in the order of its files, about `batch_rows` at a time.

        sketched: also hash the rows' contents.
        """
        log = self.train if part == "train" else self.validation
        assert log is not None, f"there is no {part} log"
        return scan(
            log,
            self.catalogue,
            self.context_encoding,
            batch_rows,
            quarantine=self._quarantine_of(part),
            sketched=sketched,
        )

    def batches(
        self,
        order: EpochOrder,
        fold: FoldOf | None = None,
        *,
        exchange: Exchange | None = None,
        cache_bytes: int = 0,
    ) -> BatchReader:
        """A reader of shuffled batches of the training log.

        Args:
            exchange: of workers that read together.
            cache_bytes: largest size of encoded row groups that are kept for later epochs in files
                of this process; none of a log of one window, which the reader keeps in memory.
        """
        kept = cache_bytes if len(order.windows(0)) > 1 else 0
        loader = Loader(
            self.train,
            self.catalogue,
            self.context_encoding,
            self._quarantine_of("train"),
            EncodedCache(kept),
        )
        return BatchReader(loader, order, fold=fold, exchange=exchange)

    def _quarantine_of(self, part: str) -> Path | None:
        """One folder per log, so that files of two logs never collide."""
        return None if self.quarantine is None else self.quarantine / part

    @property
    def fingerprint(self) -> dict[str, str]:
        content = {"train": self.train.fingerprint, "catalogue": self.catalogue.fingerprint}
        if self.validation is not None:
            content["validation"] = self.validation.fingerprint
        return content


def open_data(config: Config, progress: Progress, run_path: Path | None = None) -> PreparedData:
    """Open the logs and catalogue of `config.data`; fit encodings or restore those of the run."""
    schema = log_schema(config)
    own = ParquetLog.open(config.data.train, schema)
    validation = (
        ParquetLog.open(config.data.validation, schema or own.schema)
        if config.data.validation is not None
        else None
    )
    catalogue = Catalogue.open(
        config.data.catalogue, catalogue_schema(config), log_schema=own.schema
    )
    if config.serving.new_items is not None:
        numbers = [spec.name for spec in catalogue.schema.features if spec.kind == "numeric"]
        config.serving.new_items.check_feature(numbers)
    quarantine = (
        run_path / "quarantine"
        if run_path is not None and config.data.on_bad_rows == "quarantine"
        else None
    )
    if config.data.on_bad_rows == "quarantine" and quarantine is None:
        raise ConfigError("data.on_bad_rows=quarantine needs a run directory to write the rows to")
    older = config.incremental.replay
    train: Log = own
    if older.logs:
        seed = derive_seed(config.seed, "replay")
        joined = replay(own, older.logs, catalogue, older.share, seed)
        progress.note(
            f"replaying {joined.replayed:,} rows of {len(older.logs)} older logs beside "
            f"{own.num_rows:,} new ones; {joined.left_out:,} rows of items that have left are out"
        )
        train = joined
    store = None if run_path is None else run_path / "encodings"
    fingerprints = {"train": train.fingerprint, "catalogue": catalogue.fingerprint}
    found = None if store is None else _restore(store, fingerprints)
    if found is None:
        earlier = None if config.incremental.from_run is None else open_earlier_run(config)
        found = _fit(train, catalogue, progress, quarantine, earlier)
        if store is not None:
            _save(store, fingerprints, found)
    return _prepared(train, validation, catalogue, found, quarantine)


def prepare(
    train: Log, validation: Log | None, catalogue: Catalogue, progress: Progress
) -> PreparedData:
    """Fit the encodings in one pass over the log and one over the catalogue, in memory."""
    found = _fit(train, catalogue, progress)
    return _prepared(train, validation, catalogue, found)


def _fit(
    train: Log,
    catalogue: Catalogue,
    progress: Progress,
    quarantine: Path | None = None,
    earlier: EarlierRun | None = None,
) -> Encodings:
    """Fit the encodings, or extend those of an earlier run."""
    items = EncodingSums.of(
        catalogue.schema.features,
        (
            catalogue.table(start, min(start + DEFAULT_CHUNK, catalogue.num_items))
            for start in range(0, catalogue.num_items, DEFAULT_CHUNK)
        ),
        None,
    )
    # Before the pass over the log: a catalogue that is refused is refused at once.
    of_items = None if earlier is None else earlier.extend_items(items, catalogue, progress)
    collector = _FactCollector(train.schema)
    checker = RowChecker(
        train.schema,
        catalogue,
        quarantine=None if quarantine is None else quarantine / "train",
    )
    progress.start("reading the log", train.num_rows)
    contexts = EncodingSums.of(
        train.schema.context,
        _of_own_groups(train, collector.watch(_checked_tables(train, checker, progress))),
        train.schema.timestamp,
    )
    progress.finish()
    if earlier is None or of_items is None:
        basis = HistoryBasis(catalogue.item_ids, train.schema.timestamp)
        return Encodings(
            collector.facts(),
            FeatureEncoding.of_sums(contexts, basis),
            FeatureEncoding.of_sums(items),
        )
    of_contexts = earlier.extend_contexts(contexts, catalogue, progress)
    rows = ExtendedRows(of_contexts.rows, of_items.rows)
    for text in rows.texts:
        progress.note(text)
    facts = collector.facts(trained_rows(earlier.directory.path))
    return Encodings(facts, of_contexts.encoding, of_items.encoding, rows)


def _prepared(
    train: Log,
    validation: Log | None,
    catalogue: Catalogue,
    found: Encodings,
    quarantine: Path | None = None,
) -> PreparedData:
    for encoding in (found.context, found.item):
        encoding.share(catalogue.lookup)
    return PreparedData(
        train=train,
        validation=validation,
        catalogue=catalogue,
        context_encoding=found.context,
        item_encoding=found.item,
        items=ItemFeatures.from_catalogue(catalogue, found.item),
        facts=found.facts,
        quarantine=quarantine,
        rows=found.rows,
    )


def trained_rows(run_path: Path) -> RowSketch | None:
    """Sketch of the rows that a run was trained on; None for a run of an earlier version."""
    return RowSketch.from_dict(_facts(run_path).get("row_sketch"))


def training_profile(run_path: Path) -> tuple[LogProfile, float] | None:
    """Distributions of a run's training log, and its mean reward; None for a run of an earlier
    version."""
    facts = _facts(run_path)
    found = facts.get("profile")
    return None if found is None else (LogProfile.from_dict(found), float(facts["mean_reward"]))


def _facts(run_path: Path) -> dict[str, Any]:
    """`LogFacts` of a run as they are stored; empty where there are none."""
    try:
        facts: dict[str, Any] = read_json(run_path / "encodings" / "facts.json")["facts"]
    except (FileNotFoundError, KeyError):
        return {}
    return facts


def log_schema(config: Config) -> LogSchema | None:
    """Return the log schema of the configuration; None to use the manifest's."""
    content = config.data.log_schema
    return None if content is None else LogSchema.from_dict(content)


def catalogue_schema(config: Config) -> CatalogueSchema | None:
    """Return the catalogue schema of the configuration; None to use the manifest's."""
    content = config.data.catalogue_schema
    return None if content is None else CatalogueSchema.from_dict(content)


def _of_own_groups(log: Log, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The tables of a log's own rows; the others are read but not returned."""
    own = log.own_groups if isinstance(log, ReplayLog) else len(log.row_group_sizes)
    for number, table in enumerate(tables):
        if number < own:
            yield table


def _checked_tables(log: Log, checker: RowChecker, progress: Progress) -> Iterator[pa.Table]:
    first_row = 0
    for group, read in enumerate(log.tables()):
        table = checker.check(read, log.location(group), first_row)
        del read
        first_row += int(log.row_group_sizes[group])
        yield table
        progress.advance(int(log.row_group_sizes[group]))


class _FactCollector:
    def __init__(self, schema: LogSchema) -> None:
        self._schema = schema
        self._rows = 0
        self._sum = 0.0
        self._weight = 0.0
        self._binary = True
        self._smallest = np.inf
        self._sketch = RowSketch.empty()
        self._sample = UnitSample(schema.context)

    def watch(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            reward = table.column(self._schema.reward).to_numpy().astype(np.float64)
            number = np.arange(self._rows, self._rows + len(reward))
            self._sample = self._sample.with_rows(table, self._schema, number)
            self._rows += len(reward)
            weight = row_weights(table, self._schema)
            self._sum += float(reward.sum() if weight is None else weight @ reward)
            self._weight += float(len(reward) if weight is None else weight.sum())
            self._binary = self._binary and bool(np.isin(reward, (0.0, 1.0)).all())
            if self._schema.pscore is not None:
                pscore = table.column(self._schema.pscore).to_numpy()
                self._smallest = min(self._smallest, float(pscore.min(initial=np.inf)))
            self._sketch = self._sketch.with_rows(table, self._schema)
            yield table

    def facts(self, earlier: RowSketch | None = None) -> LogFacts:
        """Facts about the rows. earlier: sketch of what the runs before were trained on."""
        sketch = self._sketch if earlier is None else self._sketch.merge(earlier)
        return LogFacts(
            rows=self._rows,
            binary_reward=self._binary,
            mean_reward=self._sum / (self._weight or 1.0),
            mean_row_weight=self._weight / self._rows if self._rows else 1.0,
            smallest_pscore=None if np.isinf(self._smallest) else self._smallest,
            row_sketch=sketch.to_dict(),
            profile=self._sample.profile().to_dict(),
        )


def _save(store: Path, fingerprints: dict[str, str], found: Encodings) -> None:
    with checked_directory(store) as temporary:
        found.context.save(temporary / "context")
        found.item.save(temporary / "item")
        if found.rows is not None:
            (temporary / ROWS).mkdir()
            save_rows(temporary / ROWS / "context", found.rows.context)
            save_rows(temporary / ROWS / "item", found.rows.item)
        content = {"fingerprints": fingerprints, "facts": asdict(found.facts)}
        write_checked_json(temporary / "facts.json", content)


def _restore(store: Path, fingerprints: dict[str, str]) -> Encodings | None:
    if not is_complete(store):
        return None
    verify_directory(store, "restore the folder from a copy, or start a run under another name")
    content = read_json(store / "facts.json")
    if content["fingerprints"] != fingerprints:
        raise RunError(
            f"the log or the catalogue changed since '{store.parent}' began; "
            "start a run under another name (--set name=...)"
        )
    rows, extended = store / ROWS, None
    if rows.exists():
        extended = ExtendedRows(load_rows(rows / "context"), load_rows(rows / "item"))
    return Encodings(
        LogFacts(**content["facts"]),
        FeatureEncoding.load(store / "context"),
        FeatureEncoding.load(store / "item"),
        extended,
    )
