"""What a job's log says, and workers with other versions of packages."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from offtower.cli.cluster import _RayMessages
from offtower.errors import ClusterError, DataError
from offtower.execution import Execution
from offtower.jobs import job_progress, train
from offtower.jobs.job_progress import JobFollower, SharedProgress, record_failures
from offtower.jobs.mapper import _run
from offtower.jobs.resources import ResourceRequest
from offtower.jobs.worker_errors import cause_of, check_seen
from offtower.jobs.worker_settings import WorkerSettings
from tests.jobs.conftest import Recorded


def test_the_driver_shows_progress_failures_and_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, free = 0.0, {"CPU": 1.0}
    monkeypatch.setattr(job_progress, "time", SimpleNamespace(monotonic=lambda: now))

    def available_resources() -> dict[str, float]:
        if now == 20.0:
            raise ConnectionError("the head restarts")
        return free

    ray = SimpleNamespace(available_resources=available_resources)
    monkeypatch.setattr(job_progress, "import_ray", lambda: ray)
    shown = Recorded()
    follower = JobFollower(tmp_path, ResourceRequest(2), Execution(progress=shown))

    def lines() -> list[str]:
        follower.poll()
        found, shown.lines = shown.lines, []
        return found

    waiting = "waiting for 2 x {CPU: 1} since 40 s; free in the cluster: 1 CPU"
    seen = []
    for now in (5.0, 20.0, 40.0, 60.0, 71.0):
        seen.append(lines())
        free["CPU"] = 2.0 if now == 60.0 else free["CPU"]
    assert seen == [[], [], [waiting], [], ["starting 2 x {CPU: 1} since 71 s"]]

    first = SharedProgress(tmp_path)
    first.start("epoch 1 of 2", 100)
    first.note("continuing from the checkpoint of step 7")
    assert lines() == ["continuing from the checkpoint of step 7", "start epoch 1 of 2 100"]
    now = 75.0
    first.advance(30, "step 8")
    first.advance(10, "step 9")  # Within two seconds: not written yet.
    assert lines() == ["30 step 8"]
    first.finish()
    assert lines() == ["10 step 9"]

    for _ in range(2):  # The controller may poll the same failure twice.
        record_failures(tmp_path, {1: RuntimeError("Traceback\n  ...\nthe node is gone\n")})
    assert lines() == ["workers failed and start again (worker 1: the node is gone)"]
    assert lines() == []
    again = SharedProgress(tmp_path)
    again.start("rest of epoch 1 of 2", 60)
    assert lines() == ["start rest of epoch 1 of 2 60"]


def test_workers_with_other_versions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    here = WorkerSettings.of(float(threads))
    here.apply()
    modules = "offtower's modules"
    assert "+" not in here.versions["torch"], "builds for CPUs and GPUs work together"
    other = replace(here, versions={**here.versions, "torch": "1.0", modules: "0123"})
    with pytest.raises(ClusterError, match=r"torch .* instead of 1\.0, offtower's modules .* 0123"):
        other.apply()


LOW = """Task was killed.
1 worker(s) were killed due to the node running low on memory. Memory usage 31GB exceeded 30GB.
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/
"""


def test_a_worker_without_memory_is_named_as_such() -> None:
    assert cause_of(RuntimeError(LOW)).startswith("out of memory: 1 worker(s) were killed due to")
    assert cause_of(RuntimeError("Traceback\n\n  it ended \n")) == "it ended"
    assert cause_of(RuntimeError()) == "RuntimeError"
    assert len(cause_of(RuntimeError("x" * 500))) == 200


def test_a_node_without_the_storage_is_named_with_the_path(tmp_path: Path) -> None:
    """A worker looks for a folder that is there for the command's process only."""
    log, settings = tmp_path / "log", WorkerSettings.of(1.0)

    def reads(name: str) -> None:
        raise DataError(f"there is no log at '{log}' for '{name}/x' in 's3://bucket/log'")

    failed = _run(reads, "a", settings)
    assert failed.absent == (str(log), "a/x")
    assert failed.raised is failed.error  # It is nowhere.
    log.mkdir()
    assert re.match(
        rf"node {socket.gethostname()} does not see '{log}'.*\(there is no log", str(failed.raised)
    )
    lost = _run(lambda part: (tmp_path / "lost").read_bytes(), 0, settings)
    (tmp_path / "lost").touch()
    assert "does not see" in str(lost.raised) and isinstance(lost.raised, ClusterError)
    check_seen(log)
    with pytest.raises(ClusterError, match=f"node .* does not see '{tmp_path / 'run'}'"):
        check_seen(tmp_path / "run", waits=())
    train._store_failure(log / "failure.json", DataError(f"no log at '{tmp_path / 'other'}'"))
    assert isinstance(train._failure(log / "failure.json"), DataError)
    (tmp_path / "other").touch()
    assert "does not see" in str(train._failure(log / "failure.json"))


def test_messages_of_ray_lose_the_tails_of_logs(capsys: pytest.CaptureFixture[str]) -> None:
    messages = _RayMessages()
    text = "(raylet) Raylet is terminated. Last 20 lines of the Raylet logs:\n"
    text += "    [state-dump] a\n    [state-dump] b\n"
    for part in (text[:40], text[40:], "\n", "(raylet) another\n", "    an indented line\n"):
        messages.write(part)
    shown = capsys.readouterr().err.splitlines()
    assert shown == [text.splitlines()[0], "", "(raylet) another", "    an indented line"]
