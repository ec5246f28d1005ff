"""Parts of the server under faults: the queue of requests, and the log on a full disk."""

from __future__ import annotations

import asyncio
import fcntl
import shutil
import threading
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("prometheus_client")

from offtower.data.formats.conversion import Conversion
from offtower.data.formats.options import FileFormat
from offtower.data.histories import parsed_times
from offtower.errors import ConfigError, DataError, OfftowerError
from offtower.retrieval import Retriever, SampleResult, decisions_table
from offtower.retrieval.manifest import set_current
from offtower.server import DecisionSettings, Limits, ServerSettings
from offtower.server.batching import Answer, Batcher, BatchSettings
from offtower.server.columns import ContextColumns
from offtower.server.decisions import DecisionLog, _Spool
from offtower.server.errors import RequestError
from offtower.server.exports import CurrentExport, OpenExport
from offtower.server.metrics import Metrics
from offtower.server.requests import ContextRequest

EXPORT = cast(OpenExport, object())


def request(count: int = 1, k: int = 1) -> ContextRequest:
    return ContextRequest("search", pa.table({"a": range(count)}), k)


class Recorder:
    """Answers requests when it is released, and keeps what was answered together."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.calls: list[list[tuple[int, int]]] = []

    def __call__(self, _: OpenExport, requests: Sequence[ContextRequest]) -> list[Any]:
        assert self.released.wait(30)
        self.calls.append([(one.contexts.num_rows, one.k) for one in requests])
        return [Answer(cast(SampleResult, None), range(one.k), "", "") for one in requests]


def test_requests_that_wait_are_answered_together_by_kind_and_in_order() -> None:
    async def run() -> list[list[tuple[int, int]]]:
        recorder = Recorder()
        batcher = Batcher(recorder, BatchSettings(0.0, 4, 100, 30.0), Metrics())
        first = asyncio.create_task(batcher.submit(EXPORT, request()))
        await asyncio.sleep(0.05)
        sent = [request(2), request(1, k=5), request(1), request(3), request(1), request(9, k=5)]
        waiting = [asyncio.create_task(batcher.submit(EXPORT, one)) for one in sent]
        await asyncio.sleep(0)
        recorder.released.set()
        answers = await asyncio.gather(first, *waiting)
        assert [len(one.rows) for one in answers] == [1, *(one.k for one in sent)]
        await batcher.close()
        with pytest.raises(RequestError, match="stops"):
            await batcher.submit(EXPORT, request())
        return recorder.calls

    calls = asyncio.run(run())
    assert calls == [[(1, 1)], [(2, 1), (1, 1), (1, 1)], [(1, 5)], [(3, 1)], [(9, 5)]]


def test_what_waits_too_long_or_is_too_much_is_refused_before_it_is_answered() -> None:
    async def run() -> list[list[tuple[int, int]]]:
        recorder = Recorder()
        batcher = Batcher(recorder, BatchSettings(0.0, 4, 5, 0.05), Metrics())
        first = asyncio.create_task(batcher.submit(EXPORT, request()))
        await asyncio.sleep(0.02)
        late = asyncio.create_task(batcher.submit(EXPORT, request(2)))
        await asyncio.sleep(0)
        with pytest.raises(RequestError) as refused:
            await batcher.submit(EXPORT, request(4))
        assert refused.value.status == 503
        await asyncio.sleep(0.1)
        recorder.released.set()
        await first
        with pytest.raises(RequestError) as refused:
            await late
        assert refused.value.status == 504
        await batcher.submit(EXPORT, request(4))  # Nothing waits any more.
        await batcher.close()
        return recorder.calls

    assert asyncio.run(run()) == [[(1, 1)], [(4, 1)]]


@pytest.fixture(scope="module")
def served(exported: Path, world: Any) -> tuple[Retriever, SampleResult, pa.Table]:
    retriever = Retriever.open(exported)
    contexts = world.contexts(3, seed=1)
    drawn = retriever.sample(contexts, 2, seed=1)
    return retriever, drawn, decisions_table(retriever, contexts, drawn)


def logged(folder: Path) -> list[str]:
    files = sorted(folder.glob("*/*.parquet"))
    return [one for file in files for one in pq.read_table(file).column("round_id").to_pylist()]


def test_a_full_disk_loses_no_earlier_decision_and_logs_no_refused_one(
    served: tuple[Retriever, SampleResult, pa.Table],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retriever, drawn, decisions = served
    log = DecisionLog(DecisionSettings(str(tmp_path)))
    log.append(retriever, drawn, decisions)
    (spool,) = log._open.values()
    file = spool.file

    class Full:
        """A file whose disk has room for some bytes."""

        left = 300

        def write(self, content: memoryview) -> int:
            if not self.left:
                raise OSError(28, "No space left on device")
            written = file.write(content[: self.left])
            self.left -= written
            return written

    spool.file = cast(Any, Full())
    with pytest.raises(OSError, match="space"):
        log.append(retriever, drawn, decisions)
    spool.file = file
    log.append(retriever, drawn, decisions)
    # A log that cannot be reached keeps its files in the spool, and is tried again.
    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", lambda *_, **__: (_ for _ in ()).throw(OSError("away")))
        with pytest.raises(OSError, match="away"):
            log.finish(everything=True)
    assert logged(tmp_path) == [] and log.unfinished == 2
    log.close()
    rounds = decisions.column("round_id").to_pylist()
    assert logged(tmp_path) == 2 * rounds and log.unfinished == 0


def test_leftovers_are_finished_once_and_not_while_their_server_runs(
    served: tuple[Retriever, SampleResult, pa.Table], tmp_path: Path
) -> None:
    retriever, drawn, decisions = served
    settings = DecisionSettings(str(tmp_path / "log"), tmp_path / "spool")
    first = DecisionLog(settings)
    first.append(retriever, drawn, decisions)
    first.append(retriever, drawn, decisions)
    other = DecisionLog(settings)
    other.close()
    assert logged(tmp_path / "log") == []
    # The first server is killed while it writes: its locks go, its last batch is incomplete.
    (spool,) = first._open.values()
    spool.file.truncate(spool.whole - 100)
    fcntl.flock(spool.file, fcntl.LOCK_UN)
    (tmp_path / "spool" / "empty.arrows").write_bytes(b"")
    for _ in range(2):
        DecisionLog(settings).close()
    assert logged(tmp_path / "log") == decisions.column("round_id").to_pylist()
    assert not list((tmp_path / "spool").iterdir())


def test_a_server_that_starts_leaves_files_that_others_begin_or_finish(
    served: tuple[Retriever, SampleResult, pa.Table],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retriever, drawn, decisions = served
    settings = DecisionSettings(str(tmp_path / "log"), tmp_path / "spool")
    log, lock = DecisionLog(settings), fcntl.flock

    def other_starts_first(file: Any, how: int) -> None:
        if how == fcntl.LOCK_EX:
            DecisionLog(settings).close()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", other_starts_first)
    log.append(retriever, drawn, decisions)
    monkeypatch.undo()
    (path,) = (tmp_path / "spool").iterdir()
    assert _Spool.take_over(path) is None
    log.close()
    assert _Spool.take_over(path) is None
    assert logged(tmp_path / "log") == decisions.column("round_id").to_pylist()


def test_times_of_histories_may_be_of_any_form() -> None:
    """Numbers, ISO 8601 in JSON, or Arrow's timestamps: text that `parsed_times` reads alike."""
    kinds: dict[str, Any] = {"time": "any", "seen_at": "times"}
    types = pa.schema([("time", pa.string()), ("seen_at", pa.list_(pa.string()))])
    columns = ContextColumns(
        (), Conversion(kinds, types, FileFormat()), tuple(kinds), tuple(kinds), None
    )
    when = [datetime(2026, 1, 31, 10, 0, 0, 5), datetime(2026, 1, 31, 9)]
    stamps = pa.array(when, pa.timestamp("us"))
    lists = pa.ListArray.from_arrays([0, 1, 2], stamps)
    for given in (
        pa.record_batch({"time": stamps, "seen_at": lists}),
        pa.record_batch({"time": stamps, "seen_at": pa.FixedSizeListArray.from_arrays(stamps, 1)}),
        pa.RecordBatch.from_pylist(
            [{"time": one.isoformat(), "seen_at": [one.isoformat()]} for one in when]
        ),
    ):
        table = columns.table(given)
        assert parsed_times(table.column("time").combine_chunks()).to_pylist() == when
        assert parsed_times(table.column("seen_at").combine_chunks().flatten()).to_pylist() == when
    numbers = columns.table(pa.RecordBatch.from_pylist([{"time": 7, "seen_at": [3, 5]}]))
    assert numbers.to_pylist() == [{"time": "7", "seen_at": ["3", "5"]}]


def test_a_broken_export_is_opened_once_until_it_changes(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = tmp_path / "export"
    shutil.copytree(exported.parent, export)
    current = CurrentExport(export)
    served = current.opened.retriever.version
    shutil.copytree(export / exported.name, export / "broken")
    (export / "broken" / "ids.arrow").write_bytes(b"")
    set_current(export, "broken")
    opened: list[Path] = []
    whole = OpenExport.open
    monkeypatch.setattr(OpenExport, "open", lambda path: (opened.append(path), whole(path))[1])
    with pytest.raises(OfftowerError):
        current.reload()
    assert [current.reload() for _ in range(3)] == [False] * 3 and len(opened) == 1
    assert (current.refused, current.opened.retriever.version) == ("broken", served)
    with pytest.raises(OfftowerError):  # POST /reload asks for it.
        current.reload(again=True)
    shutil.copy(exported / "ids.arrow", export / "broken" / "ids.arrow")
    current.reload()
    assert current.refused is None and current.opened.retriever.directory.name == "broken"
    assert len(opened) == 3


def test_settings_are_checked(tmp_path: Path) -> None:
    for wrong in (
        lambda: Limits(k=0),
        lambda: DecisionSettings("log", rotate_seconds=-1.0),
        lambda: ServerSettings(tmp_path, batch_contexts=0),
    ):
        with pytest.raises(ConfigError, match="positive"):
            wrong()
    with pytest.raises((ConfigError, DataError)):
        DecisionLog(DecisionSettings("s3://bucket/log"))
