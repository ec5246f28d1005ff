"""The ledger of a log: appended by several writers, kept by copies, and no part of the log."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from offtower.data import LogSchema, ParquetLog, write_log
from offtower.data.content import log_content
from offtower.data.ledger import FOLDER, Ledger, LogLedger, record
from offtower.errors import DataError
from tests.stores import in_memory

SCHEMA = LogSchema(pscore="pscore")


def write(folder: Path, first: float) -> ParquetLog:
    rewards = [first, 0.0, 1.0]
    table = pa.table({"action": ["a", "b", "c"], "reward": rewards, "pscore": [0.5, 0.5, 0.25]})
    write_log(folder, [table], SCHEMA)
    return ParquetLog.open(folder)


def test_concurrent_writers_number_their_entries_without_gaps(tmp_path: Path) -> None:
    log = write(tmp_path / "log", 1.0)

    def append(writer: int) -> None:
        ledger = LogLedger(tmp_path / "log")
        for _ in range(5):
            ledger.append(
                log.content.fingerprint, "note", lambda known: {"by": writer, "known": len(known)}
            )

    with ThreadPoolExecutor(6) as writers:
        list(writers.map(append, range(6)))
    entries = LogLedger(tmp_path / "log").entries(log.content.fingerprint)
    assert [entry.number for entry in entries] == list(range(1, 31))
    # Each saw all the entries before it.
    assert [entry.facts["known"] for entry in entries] == list(range(30))
    assert sorted(entry.facts["by"] for entry in entries) == sorted([*range(6)] * 5)


def test_entries_change_no_fingerprint_and_go_with_a_copy(tmp_path: Path) -> None:
    log = write(tmp_path / "log", 1.0)
    before = log.fingerprint, log.content
    record(tmp_path / "log", log.content.fingerprint, "trained", {"policy": "p"})
    again = ParquetLog.open(tmp_path / "log")
    assert (again.fingerprint, again.content) == before
    shutil.copytree(tmp_path / "log", tmp_path / "copy")
    assert LogLedger(tmp_path / "copy").entries(log.content.fingerprint)[0].facts == {"policy": "p"}
    # Other rows in the same folder begin without any entry.
    other = write(tmp_path / "other", 0.0)
    shutil.copy(tmp_path / "other" / "part-00000.parquet", tmp_path / "log")
    shutil.copy(tmp_path / "other" / "_offtower.json", tmp_path / "log")
    assert LogLedger(tmp_path / "log").entries(other.content.fingerprint) == ()
    assert log_content(tmp_path / "log") == other.content


def test_content_is_the_same_under_another_name_and_without_a_manifest(tmp_path: Path) -> None:
    log = write(tmp_path / "log", 1.0)
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "log" / "part-00000.parquet", tmp_path / "bare" / "rows.parquet")
    record(tmp_path / "log", log.content.fingerprint, "trained", {"policy": "p"})
    shutil.copytree(tmp_path / "log" / FOLDER, tmp_path / "bare" / FOLDER)
    for place in (tmp_path / "bare", tmp_path / "bare" / "rows.parquet"):
        bare = ParquetLog.open(place, SCHEMA)
        assert bare.content.shared_files(log.content.files) == 1
        assert len(LogLedger(place).entries(bare.content.fingerprint)) == 1
    assert bare.content.shared_files(write(tmp_path / "other", 0.0).content.files) == 0


def test_a_changed_or_removed_entry_is_noticed(tmp_path: Path) -> None:
    log = write(tmp_path / "log", 1.0)
    for number in range(3):
        record(tmp_path / "log", log.content.fingerprint, "trained", {"policy": str(number)})
    entry = tmp_path / "log" / FOLDER / "000002.json"
    text = entry.read_text()
    entry.write_text(text.replace('"policy": "1"', '"policy": "7"'))
    with pytest.raises(DataError, match=r"changed after it was written.*Restore it from a copy"):
        LogLedger(tmp_path / "log").entries(log.content.fingerprint)
    entry.unlink()
    with pytest.raises(DataError, match=r"entry 2 of the ledger .* is missing"):
        LogLedger(tmp_path / "log").entries(log.content.fingerprint)
    entry.write_text(text)
    assert len(LogLedger(tmp_path / "log").entries(log.content.fingerprint)) == 3


def test_a_use_is_recorded_once_and_a_failure_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = write(tmp_path / "log", 1.0)
    for _ in range(2):
        record(tmp_path / "log", log.content.fingerprint, "trained", {"runs": ["p"]})
    assert len(LogLedger(tmp_path / "log").entries(log.content.fingerprint)) == 1
    stored = json.loads((tmp_path / "log" / FOLDER / "000001.json").read_text())
    assert stored["kind"] == "trained" and stored["facts"] == {"runs": ["p"]}
    shutil.rmtree(tmp_path / "log" / FOLDER)
    (tmp_path / "log" / FOLDER).write_text("no folder")
    with caplog.at_level(logging.WARNING, "offtower.ledger"):
        record(tmp_path / "log", log.content.fingerprint, "trained", {"runs": ["p"]})
    assert "could not record" in caplog.text


def test_a_log_in_a_store_has_a_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    place = in_memory(monkeypatch) + "/logs/mine"
    write_log(place, [pa.table({"action": ["a"], "reward": [1.0], "pscore": [0.5]})], SCHEMA)
    before = ParquetLog.open(place)
    for number in range(3):
        record(place, before.content.fingerprint, "trained", {"policy": str(number)})
    after = ParquetLog.open(place)
    assert after.fingerprint == before.fingerprint
    entries = LogLedger(place).entries(after.content.fingerprint)
    assert [entry.facts["policy"] for entry in entries] == ["0", "1", "2"]


def test_a_ledger_in_memory_keeps_logs_apart() -> None:
    ledger = Ledger()
    ledger.append("a", "trained", lambda known: {})
    assert ledger.append("b", "trained", lambda known: None) is None
    assert len(ledger.entries("a")) == 1 and ledger.entries("b") == ()
