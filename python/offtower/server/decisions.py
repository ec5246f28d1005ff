"""The log of decisions: Parquet files that `offtower join` and `offtower ingest` read as they are.

    LOG/1f0c9a52d7e3/20261130T101500-….parquet   finished files, which are never written again
    LOG/1f0c9a52d7e3.schema.yaml                 their schema, where `join` and `ingest` find it
    SPOOL/20261130T101500-….arrows               files that are being written

Files whose columns or log schema differ are in folders of their own, named by a hash: an export
with other features, or calls that excluded items, begin another folder.

A decision is appended to a local file before its request is answered, so it survives the end of
the process, however it ends. A file is finished when it is old or large enough: it appears in the
log at once and as a whole. Files that a killed server left are finished by the next one with the
same spool; locks distinguish them from those of servers that run.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from offtower.data.join.files import schema_beside
from offtower.data.location import Location
from offtower.data.output import new_file
from offtower.errors import ConfigError, OfftowerError
from offtower.retrieval import Retriever, SampleResult, catalogue_section, served_schema
from offtower.server.settings import DecisionSettings

logger = logging.getLogger("offtower.server")

_SCHEMA = b"offtower.schema"
_SPOOL = ".spool"
_SUFFIX = ".arrows"


@dataclass
class _Spool:
    """A local Arrow stream of one series that decisions are appended to, locked while it is open.

    `whole` counts the bytes up to the end of the last complete batch.
    """

    path: Path
    series: str
    file: io.FileIO
    begun: float = 0.0
    whole: int = 0

    @classmethod
    def create(cls, folder: Path, series: str, schema: pa.Schema) -> _Spool:
        stem = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:16]}"
        path = folder / f"{stem}{_SUFFIX}"
        # Locked before other servers see its name, or one could take it for a leftover.
        hidden = path.with_suffix(".new")
        file = io.FileIO(hidden, "x")
        fcntl.flock(file, fcntl.LOCK_EX)
        hidden.rename(path)
        spool = cls(path, series, file, begun=time.monotonic())
        try:
            spool.write(schema)
        except BaseException:
            spool.remove()
            raise
        return spool

    @classmethod
    def take_over(cls, path: Path) -> _Spool | None:
        """Lock a file that an ended server left; None where another server has it or finished it.

        A file without a whole schema is removed: nothing was answered from it.
        """
        try:
            file = io.FileIO(path, "r+")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = path.stat().st_size
        except (BlockingIOError, FileNotFoundError):
            file.close()
            return None
        spool = cls(path, "", file, whole=size)
        try:
            with path.open("rb") as content, pa.ipc.open_stream(content) as stream:
                columns = stream.schema
        except pa.ArrowInvalid:
            spool.remove()
            return None
        text = columns.metadata[_SCHEMA].decode()
        spool.series = _series_name(text, columns.remove_metadata())
        return spool

    def write(self, part: pa.Schema | pa.RecordBatch) -> None:
        """Append a message of the stream, as a whole or with an error."""
        content = memoryview(part.serialize())
        while content:
            content = content[self.file.write(content) :]
        self.whole = self.file.tell()

    def read(self) -> pa.Table | None:
        """All complete batches; None where there is none."""
        content = self.path.read_bytes()[: self.whole]
        batches = []
        try:
            with pa.ipc.open_stream(content) as stream:
                schema = stream.schema
                while True:
                    batches.append(stream.read_next_batch())
        except (StopIteration, pa.ArrowInvalid, OSError):
            # A killed writer leaves its last batch incomplete.
            pass
        return pa.Table.from_batches(batches, schema) if batches else None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.file.close()


class DecisionLog:
    """Appends decisions, and finishes files.

    `append` is called by one thread at a time, `finish` by any.

    Args:
        settings: where, and when files are finished.
        finished: called with the number of files that were finished.

    Raises:
        ConfigError: a log in a store has no spool, or the spool cannot be written to.
    """

    def __init__(
        self, settings: DecisionSettings, finished: Callable[[int], None] = lambda count: None
    ) -> None:
        self._settings, self._finished = settings, finished
        self._log = Location.of(settings.log)
        if settings.spool is None and self._log.local is None:
            raise ConfigError(
                f"the log of decisions '{self._log}' is in a store: name a local folder for the "
                "files that are being written (--spool DIR), which outlives the process"
            )
        local = self._log.local or Path()
        self._folder = settings.spool or local / _SPOOL
        self._open: dict[str, _Spool] = {}
        self._sealed: list[_Spool] = []
        self._names: dict[tuple[object, ...], tuple[str, pa.Schema]] = {}
        self._lock, self._finishing = threading.Lock(), threading.Lock()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._take_leftovers()
        except OSError as error:
            raise ConfigError(
                f"decisions cannot be written to '{self._folder}': {error}"
            ) from error

    @property
    def unfinished(self) -> int:
        """Files that are written to, or wait to be finished."""
        return len(self._open) + len(self._sealed)

    def append(self, retriever: Retriever, served: SampleResult, decisions: pa.Table) -> None:
        """Append rows of `decisions_table`; when it returns, the end of this process loses none.

        Raises:
            OSError: they could not be written; none of them is in the log.
        """
        if not decisions.num_rows:
            return
        series, schema = self._series(retriever, served, decisions)
        with self._lock:
            spool = self._open.get(series)
            if spool is None:
                spool = self._open[series] = _Spool.create(self._folder, series, schema)
            try:
                for batch in decisions.combine_chunks().to_batches():
                    spool.write(batch)
            except BaseException:
                # What follows an incomplete batch could not be read.
                self._seal(series)
                raise
            if spool.whole >= self._settings.rotate_bytes:
                self._seal(series)

    def finish(self, *, everything: bool = False) -> None:
        """Finish files that are old enough, or all; what fails is tried again by the next call."""
        with self._lock:
            now = time.monotonic()
            for series, spool in list(self._open.items()):
                if everything or now - spool.begun >= self._settings.rotate_seconds:
                    self._seal(series)
        with self._finishing:
            while self._sealed:
                try:
                    self._publish(self._sealed[0])
                except (OSError, OfftowerError, pa.ArrowException) as error:
                    logger.error("'%s' cannot be finished: %s", self._sealed[0].path, error)
                    raise
                self._sealed.pop(0).remove()

    def close(self) -> None:
        """Finish all files; those that cannot be finished stay for the next server."""
        try:
            self.finish(everything=True)
        finally:
            for spool in [*self._open.values(), *self._sealed]:
                spool.file.close()

    def _series(
        self, retriever: Retriever, served: SampleResult, decisions: pa.Table
    ) -> tuple[str, pa.Schema]:
        """Name of the folder for these columns under this log schema, and the columns with it."""
        key = (retriever.version, served.excluded is None, decisions.schema)
        if key not in self._names:
            content = {
                "log": served_schema(retriever, served).to_dict(),
                "catalogue": catalogue_section(retriever).to_dict(),
            }
            text = yaml.safe_dump(content, sort_keys=False)
            plain = decisions.schema.remove_metadata()
            self._names[key] = _series_name(text, plain), plain.with_metadata({_SCHEMA: text})
        return self._names[key]

    def _seal(self, series: str) -> None:
        spool = self._open.pop(series)
        self._sealed.append(spool)

    def _publish(self, spool: _Spool) -> None:
        table = spool.read()
        if table is None:
            return
        folder = self._log / spool.series
        text = table.schema.metadata[_SCHEMA]
        beside = schema_beside(folder)
        # The schema comes first, so that a file is never without it.
        if not beside.exists():
            beside.write_bytes(text)
        with new_file(folder / f"{spool.path.stem}.parquet") as path:
            pq.write_table(
                table.replace_schema_metadata(None),
                path,
                compression="zstd",
                write_page_checksum=True,
            )
        self._finished(1)

    def _take_leftovers(self) -> None:
        """Take over the files of servers that ended without finishing them."""
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            spool = _Spool.take_over(path)
            if spool is not None:
                self._sealed.append(spool)
                logger.info("finishing '%s', which an earlier server left", path)


def _series_name(text: str, columns: pa.Schema) -> str:
    """Name of the folder of files with this log schema and these columns."""
    return hashlib.sha256(f"{text}\n{columns}".encode()).hexdigest()[:12]
