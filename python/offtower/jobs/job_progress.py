"""Progress of a training job, shown by the driver, and requests to stop, sent by the driver.

They are small files in the job's folder below the run, which every node sees: `progress.json`,
replaced by the first worker every two seconds; `restarts.jsonl`, one line for each failure of
workers, by the job's controller; and `stop`, by the driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offtower.execution import Execution
from offtower.interruption import Interruption
from offtower.jobs.resources import ResourceRequest, import_ray
from offtower.jobs.worker_errors import cause_of
from offtower.progress import Progress, duration

_STOP = "stop"
_WRITE_SECONDS = 2.0
_POLL_SECONDS = 1.0
_WAITING_SECONDS = 10.0
"""Seconds without workers before the first line that says so."""
_REPEAT_SECONDS = 30.0


@dataclass
class JobState:
    """Progress of one attempt: the workers from one start to the next.

    Attributes:
        attempt: unique to the start of the workers.
        number: of the current task, counted from 1; 0 before the first.
        task, total, done, note: of the task, as in `Progress`.
        notes: lines that stay.
    """

    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)
    number: int = 0
    task: str = ""
    total: int | None = None
    done: int = 0
    note: str = ""
    notes: list[str] = field(default_factory=list)


class SharedProgress(Progress):
    """Writes the reports of the first worker to a file.

    Args:
        folder: of the job, on storage that the driver sees.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._state, self._written = folder / "progress.json", JobState(), 0.0
        self._write()

    def start(self, task: str, total: int | None) -> None:
        state = self._state
        state.number, state.task, state.total = state.number + 1, task, total
        state.done, state.note = 0, ""
        self._write()

    def advance(self, amount: int, note: str = "") -> None:
        self._state.done += amount
        self._state.note = note
        if time.monotonic() - self._written >= _WRITE_SECONDS:
            self._write()

    def finish(self) -> None:
        self._write()

    def note(self, message: str) -> None:
        self._state.notes.append(message)
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        temporary = self._path.with_name(f".{self._path.name}.{self._state.attempt}.partial")
        # What cannot be written is not shown; training goes on.
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(asdict(self._state)), encoding="utf-8")
            os.replace(temporary, self._path)


class WorkerInterruption(Interruption):
    """The driver's request to stop, and Ray's notices of nodes that are taken away.

    Args:
        folder: of the job.
    """

    has_notices = True

    def __init__(self, folder: Path) -> None:
        self._path, self._looked, self._stop = folder / _STOP, time.monotonic(), False

    def stop_requested(self) -> bool:
        if not self._stop and time.monotonic() - self._looked > _POLL_SECONDS:
            self._looked, self._stop = time.monotonic(), self._path.exists()
        return self._stop

    def preempted(self) -> bool:
        from ray.train import get_preemption_info

        return get_preemption_info() is not None


def record_failures(folder: Path, causes: Mapping[int, Exception]) -> None:
    """Append the failures of workers, by rank, to the job's file."""
    texts = {str(rank): cause_of(error) for rank, error in causes.items()}
    with contextlib.suppress(OSError), open(folder / "restarts.jsonl", "a") as file:
        file.write(json.dumps(texts) + "\n")


class JobFollower:
    """Shows a job's files as progress; `poll` reads what is new.

    Args:
        folder: of the job.
        request: of the workers, for the lines that say what the job waits for.
        execution: shows the reports, and may ask the workers to stop.
    """

    def __init__(self, folder: Path, request: ResourceRequest, execution: Execution) -> None:
        self._folder, self._request, self._progress = folder, request, execution.progress
        self._interruption = execution.interruption
        self._shown = JobState(attempt="")
        self._failures = 0
        self._waiting_since: float | None = time.monotonic()
        self._said = -_REPEAT_SECONDS

    @property
    def trains(self) -> bool:
        """Whether workers train, as far as the files say."""
        return self._waiting_since is None

    def poll(self) -> None:
        """Show new failures, notes and progress, and how long the job has waited for workers; pass
        a request to stop on to the workers."""
        self._read()
        if self._waiting_since is not None:
            self._say_waiting(time.monotonic() - self._waiting_since)

    def _read(self) -> None:
        stop = self._folder / _STOP
        if self._interruption.stop_requested() and not stop.exists():
            stop.touch()
            self._progress.note("stopping: the workers write a checkpoint")
        for causes in self._new_failures():
            text = "; ".join(f"worker {rank}: {cause}" for rank, cause in sorted(causes.items()))
            self._progress.note(f"workers failed and start again ({text})")
            self._waiting_since = time.monotonic()
        state = self._state()
        if state is not None and state.attempt != self._shown.attempt:
            self._shown, self._waiting_since = JobState(attempt=state.attempt), None
        if state is not None and self._waiting_since is None:
            self._show(state)

    def finish(self) -> None:
        """Show the last reports."""
        self._read()
        self._progress.finish()

    def _show(self, state: JobState) -> None:
        shown = self._shown
        for message in state.notes[len(shown.notes) :]:
            self._progress.note(message)
        new = state.done
        if state.number == shown.number:
            new -= shown.done
        else:
            self._progress.start(state.task, state.total)
        if state.number:
            # Also without progress: a line of plain text comes by the clock.
            self._progress.advance(new, state.note)
        self._shown = state

    def _say_waiting(self, seconds: float) -> None:
        if seconds < _WAITING_SECONDS or seconds - self._said < _REPEAT_SECONDS:
            return
        try:
            free = import_ray().available_resources()
        except Exception:  # While Ray's head restarts; the next poll tries again.
            return
        self._said = seconds
        request = self._request
        missing = [
            f"{free.get(name, 0.0):g} {name}"
            for name, amount in request.resources.items()
            if free.get(name, 0.0) < amount * request.num_workers
        ]
        each = ", ".join(f"{name}: {amount:g}" for name, amount in request.resources.items())
        wanted = f"{request.num_workers} x {{{each}}} since {duration(seconds)}"
        self._progress.note(
            f"waiting for {wanted}; free in the cluster: {', '.join(missing)}"
            if missing
            else f"starting {wanted}"
        )

    def _new_failures(self) -> Sequence[Mapping[str, str]]:
        try:
            lines = (self._folder / "restarts.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        except OSError:
            return ()
        new, self._failures = lines[self._failures :], len(lines)
        # The controller may record a failure at several polls.
        self._said = -_REPEAT_SECONDS if new else self._said
        return [json.loads(line) for line in dict.fromkeys(new)]

    def _state(self) -> JobState | None:
        try:
            content: dict[str, Any] = json.loads(
                (self._folder / "progress.json").read_text(encoding="utf-8")
            )
        except (OSError, ValueError):
            return None
        return JobState(**content)


@contextmanager
def following(follower: JobFollower) -> Iterator[None]:
    """Poll the follower in a thread until the block ends."""
    done = threading.Event()

    def follow() -> None:
        while not done.wait(_POLL_SECONDS):
            follower.poll()

    thread = threading.Thread(target=follow, name="offtower-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        follower.finish()
