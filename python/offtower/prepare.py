"""Opened logs, fitted encodings and facts about rewards, for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
from offtower.data.encoded_cache import EncodedCache
from offtower.data.encoding import FeatureEncoding
from offtower.data.encoding_fit import EncodingSums
from offtower.data.extension import TableRows, load_rows, save_rows
from offtower.data.histories import HistoryBasis
from offtower.data.loading import Loader
from offtower.data.log import Log, ParquetLog
from offtower.data.order import EpochOrder
from offtower.data.profile import LogProfile
from offtower.data.reader import BatchReader, FoldOf, scan
from offtower.data.replay import replay
from offtower.data.row_sketch import RowSketch
from offtower.data.rows import EncodedRows
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.data.shared_windows import Exchange
from offtower.errors import ConfigError, RunError
from offtower.log_sums import FittingPart, LogFacts, LogSums, item_part, log_part
from offtower.models.device_items import items_to_device
from offtower.models.items import ItemFeatures
from offtower.progress import Progress
from offtower.seeds import derive_seed


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


@dataclass(frozen=True)
class OpenedData:
    """Logs and catalogue of a configuration, before encodings are fitted or restored."""

    config: Config
    train: Log
    validation: Log | None
    catalogue: Catalogue
    run_path: Path | None

    @classmethod
    def open(cls, config: Config, progress: Progress, run_path: Path | None = None) -> OpenedData:
        """Open the logs and the catalogue of `config.data`."""
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
        if config.data.on_bad_rows == "quarantine" and run_path is None:
            raise ConfigError(
                "data.on_bad_rows=quarantine needs a run directory to write the rows to"
            )
        older = config.incremental.replay
        train: Log = own
        if older.logs:
            seed = derive_seed(config.seed, "replay")
            joined = replay(own, older.logs, catalogue, older.share, seed)
            progress.note(
                f"replaying {joined.replayed:,} rows of {len(older.logs)} older "
                f"{'log' if len(older.logs) == 1 else 'logs'} beside "
                f"{own.num_rows:,} new ones; {joined.left_out:,} rows of items that have left are "
                "out"
            )
            train = joined
        return cls(config, train, validation, catalogue, run_path)

    @property
    def quarantine(self) -> Path | None:
        """Folder for bad rows, with data.on_bad_rows=quarantine."""
        if self.run_path is None or self.config.data.on_bad_rows != "quarantine":
            return None
        return self.run_path / "quarantine"

    @property
    def store(self) -> Path | None:
        """Folder of the run's encodings."""
        return None if self.run_path is None else self.run_path / "encodings"

    @property
    def fingerprints(self) -> dict[str, str]:
        return {"train": self.train.fingerprint, "catalogue": self.catalogue.fingerprint}

    def part(self, progress: Progress, worker: tuple[int, int] = (0, 1)) -> FittingPart:
        """Read this worker's share of the catalogue and of the training log: of worker r of R the
        r-th of R runs of consecutive rows."""
        items = item_part(self.catalogue, worker)
        return FittingPart(
            items, log_part(self.train, self.catalogue, self.quarantine, progress, worker)
        )

    def fit(self, parts: Sequence[FittingPart] | None, progress: Progress) -> Encodings:
        """Fit encodings on the parts of all workers, or on what this process reads; store them."""
        earlier = (
            None if self.config.incremental.from_run is None else open_earlier_run(self.config)
        )
        found = _fit(self.train, self.catalogue, progress, self.quarantine, earlier, parts)
        if self.store is not None:
            _save(self.store, self.fingerprints, found)
        return found

    def restored(self) -> Encodings | None:
        """The run's stored encodings; None where there are none."""
        return None if self.store is None else _restore(self.store, self.fingerprints)

    def prepared(self, found: Encodings) -> PreparedData:
        return _prepared(self.train, self.validation, self.catalogue, found, self.quarantine)


def open_data(config: Config, progress: Progress, run_path: Path | None = None) -> PreparedData:
    """Open the logs and catalogue of `config.data`; fit encodings or restore those of the run."""
    opened = OpenedData.open(config, progress, run_path)
    found = opened.restored()
    return opened.prepared(opened.fit(None, progress) if found is None else found)


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
    parts: Sequence[FittingPart] | None = None,
) -> Encodings:
    """Fit the encodings, or extend those of an earlier run.

    parts: of all workers in their order; None reads all rows here.
    """
    of_items = [item_part(catalogue)] if parts is None else [part.items for part in parts]
    items = EncodingSums.of_parts(catalogue.schema.features, of_items)
    # Before the pass over the log: a catalogue that is refused is refused at once.
    extended_items = None if earlier is None else earlier.extend_items(items, catalogue, progress)
    log = LogSums.of_parts(
        train.schema,
        [log_part(train, catalogue, quarantine, progress)]
        if parts is None
        else [part.log for part in parts],
    )
    if earlier is None or extended_items is None:
        basis = HistoryBasis(catalogue.item_ids, train.schema.timestamp)
        return Encodings(
            log.facts(),
            FeatureEncoding.of_sums(log.contexts, basis),
            FeatureEncoding.of_sums(items),
        )
    of_contexts = earlier.extend_contexts(log.contexts, catalogue, progress)
    rows = ExtendedRows(of_contexts.rows, extended_items.rows)
    for text in rows.texts:
        progress.note(text)
    facts = log.facts(trained_rows(earlier.directory.path))
    return Encodings(facts, of_contexts.encoding, extended_items.encoding, rows)


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
