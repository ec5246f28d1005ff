"""Leases: one owner at a time, found dead or alive, and stopped once another has taken over."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs

from offtower.data import lease as module
from offtower.data.lease import Lease, Owner
from offtower.data.lease_files import FOLDER, StoreLeaseFiles, open_lease_files
from offtower.data.location import Location
from offtower.errors import DataError, LeaseError
from tests.stores import in_memory, mounted

FOREIGN = Owner("elsewhere", 7, "1", "another machine", "2026-01-01T00:00:00+00:00", "f" * 32)


def as_if_elsewhere(folder: Path, token: int = 1, owner: Owner = FOREIGN) -> Path:
    """Lease files of an owner on another machine; returns its heartbeat."""
    (folder / FOLDER).mkdir(parents=True)
    (folder / FOLDER / f"{token:06d}.json").write_text(json.dumps(asdict(owner)))
    heartbeat = folder / FOLDER / f"{token:06d}.{owner.id}.alive"
    heartbeat.touch()
    return heartbeat


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner whose heartbeat alone could tell would be waited for longer than any test runs."""
    monkeypatch.setattr(module, "STALE_SECONDS", 1e9)


class InMemory(fs.FSSpecHandler):
    """fsspec's file system in memory, whose listings have a leading slash that others lack."""

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        found = super().get_file_info_selector(selector)
        return [fs.FileInfo(one.path.lstrip("/"), one.type, size=one.size) for one in found]


@pytest.fixture(params=["path", "store", "store with conditional put"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of each kind of storage."""
    if request.param == "path":
        return str(tmp_path / "run")
    if request.param == "store":
        return in_memory(monkeypatch) + "/runs/a"
    handler = InMemory(MemoryFileSystem())
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return mounted(monkeypatch, fs.PyFileSystem(handler)) + "/runs/a"


def test_a_second_owner_is_refused_with_the_name_of_the_first(folder: str, patient: None) -> None:
    with Lease.acquire(folder) as first:
        first.verify()
        who = f"process {os.getpid()} on host {socket.gethostname()} since {first.key.owner.since}"
        with pytest.raises(LeaseError, match=f"is being written by {re.escape(who)}.*, or wait"):
            Lease.acquire(folder, remedy=", or wait")
        first.verify()
    with Lease.acquire(folder) as second:
        assert second.token == first.token + 1


def test_taking_over_stops_the_earlier_owner(folder: str) -> None:
    with Lease.acquire(folder) as first, Lease.follow(first.key) as worker:
        with Lease.acquire(folder, take_over=True) as second:
            for one in (first, worker):
                with pytest.raises(
                    LeaseError, match=re.escape(f"taken over by {second.key.owner}")
                ):
                    one.verify()
                with pytest.raises(LeaseError, match="taken over"):
                    one.check()
            second.verify()
        first.release()
        assert second.token == first.token + 1


def test_release_can_remove_all_lease_files(folder: str) -> None:
    place = Location.of(folder)
    Lease.acquire(folder).release(remove=True)
    assert not place.files()
    first = Lease.acquire(folder)
    second = Lease.acquire(folder, take_over=True)
    first.release(remove=True)
    second.verify()
    second.release()


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_claim_at_once_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    for number in range(20):
        start = threading.Barrier(8)

        def claim(_: int, start: threading.Barrier = start, number: int = number) -> Lease | None:
            start.wait()
            try:
                return Lease.acquire(tmp_path / str(number))
            except LeaseError:
                return None

        with ThreadPoolExecutor(8) as threads:
            found = [one for one in threads.map(claim, range(8)) if one is not None]
        assert len(found) == 1
        found[0].check()
        found[0].release()


def test_an_owner_file_that_is_still_empty_belongs_to_a_living_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without links a file exists before its content; its time of change may stay the same."""
    monkeypatch.setattr(module, "_FILL_SECONDS", 0.0)
    monkeypatch.setattr(module, "STALE_SECONDS", 3.0)
    owner = tmp_path / FOLDER / "000001.json"
    with Lease.acquire(tmp_path):
        content, time_of_change = owner.read_bytes(), owner.stat().st_mtime_ns

        def fill() -> None:
            owner.write_bytes(content)
            os.utime(owner, ns=(time_of_change, time_of_change))

        owner.write_bytes(b"")
        os.utime(owner, ns=(time_of_change, time_of_change))
        late = threading.Timer(0.2, fill)
        late.start()
        with pytest.raises(LeaseError, match="is being written"):
            Lease.acquire(tmp_path)
        late.join()


def _no_links(*names: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_a_link_that_the_server_made_twice_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS repeats a request whose answer was lost; the repetition finds the file there."""
    link: Callable[..., None] = os.link

    def repeated(*names: object) -> None:
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", repeated)
    with Lease.acquire(tmp_path) as lease:
        assert lease.token == 1


def test_a_killed_owner_is_recognized_at_once(tmp_path: Path, patient: None) -> None:
    code = (
        "import os, sys; from offtower.data.lease import Lease; "
        "Lease.acquire(sys.argv[1]); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    killed.wait(timeout=60)
    with Lease.acquire(tmp_path) as lease:
        assert lease.token == 2
        assert lease.interrupted is not None and lease.interrupted.process == killed.pid


def test_a_process_number_that_is_used_again_is_another_process(
    tmp_path: Path, patient: None
) -> None:
    me = Owner.this_process()
    as_if_elsewhere(tmp_path / "dead", owner=replace(me, started="12"))
    Lease.acquire(tmp_path / "dead").release()
    as_if_elsewhere(tmp_path / "alive", owner=me)
    with pytest.raises(LeaseError, match="is being written"):
        Lease.acquire(tmp_path / "alive")


def test_a_remote_owner_is_alive_while_it_sends_heartbeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALE_SECONDS", 30.0)
    heartbeat = as_if_elsewhere(tmp_path)
    beat = threading.Timer(0.1, os.utime, [heartbeat, (2e9, 2e9)])
    beat.start()
    with pytest.raises(LeaseError, match="process 7 on host elsewhere since 2026"):
        Lease.acquire(tmp_path)
    beat.join()


def test_a_remote_owner_is_dead_without_heartbeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    os.utime(as_if_elsewhere(tmp_path / "long"), (1e9, 1e9))
    with Lease.acquire(tmp_path / "long") as lease:
        assert lease.interrupted == FOREIGN
    assert not caplog.text
    monkeypatch.setattr(module, "STALE_SECONDS", 0.3)
    as_if_elsewhere(tmp_path / "short")
    with Lease.acquire(tmp_path / "short") as lease:
        assert lease.token == 2
    assert "waiting up to" in caplog.text and "host elsewhere" in caplog.text


def test_a_damaged_owner_file_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALE_SECONDS", 0.2)
    as_if_elsewhere(tmp_path)
    (tmp_path / FOLDER / "000001.json").write_text("{")
    with Lease.acquire(tmp_path) as lease:
        assert lease.token == 2


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        json.dumps({**asdict(FOREIGN), "id": "../../x"}),
        json.dumps({**asdict(FOREIGN), "process": "a\0b", "machine": module._machine()}),
    ],
    ids=["deep", "a path for an id", "text for a process"],
)
def test_a_hostile_owner_file_has_an_unknown_owner(tmp_path: Path, content: str) -> None:
    as_if_elsewhere(tmp_path)
    file = tmp_path / FOLDER / "000001.json"
    file.write_text(content)
    os.utime(file, (0.0, 0.0))
    with Lease.acquire(tmp_path) as lease:
        assert lease.interrupted == Owner.unknown()


def test_files_that_are_not_of_a_lease_stay(tmp_path: Path) -> None:
    kept = [tmp_path / FOLDER / name for name in ("letter.txt", "2024.txt", ".profile")]
    kept[0].parent.mkdir()
    for path in kept:
        path.touch()
    with Lease.acquire(tmp_path):
        pass
    assert all(path.exists() for path in kept)


def test_a_link_in_place_of_the_lease_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"\.lease' is a symbolic link"):
        Lease.acquire(tmp_path / "run")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_owner_shows_that_it_is_alive(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    with Lease.acquire(folder) as lease:
        files = open_lease_files(Location.of(folder))
        name = module._heartbeat_name(lease.token, lease.key.owner)
        before, beaten = files.pulse(name), threading.Event()
        for _ in range(1000):
            if files.pulse(name) != before:
                beaten.set()
                break
            beaten.wait(0.01)
        assert beaten.is_set()


def test_the_last_of_two_writers_owns_a_token_without_conditional_put(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = Location.of(in_memory(monkeypatch) + "/runs/a")
    files = StoreLeaseFiles(place)
    monkeypatch.setattr(
        "time.sleep", lambda seconds: (place / "000001.json").write_bytes(b"another")
    )
    assert not files.create("000001.json", b"mine")


def test_a_removed_folder_stops_its_owner(tmp_path: Path) -> None:
    with Lease.acquire(tmp_path / "run") as lease:
        for path in (tmp_path / "run" / FOLDER).iterdir():
            path.unlink()
        with pytest.raises(LeaseError, match="was removed while process"):
            lease.check()
