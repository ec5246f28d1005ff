"""Stores for tests: one in memory, and one over a folder that fails, waits and counts as told."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from offtower.data import lease_files, stores


def failing_reads(monkeypatch: pytest.MonkeyPatch, every: int, text: str) -> Callable[[str], None]:
    """Return a hook for `Unruly.before` that fails every k-th read, of any thread.

    The number of attempts is raised, so that no read fails too often by chance.
    """
    monkeypatch.setattr(stores, "ATTEMPTS", 30)
    count = 0

    def before(path: str) -> None:
        nonlocal count
        count += 1
        if count % every == 0:
            raise OSError(text)

    return before


def mounted(monkeypatch: pytest.MonkeyPatch, filesystem: fs.FileSystem, name: str = "b") -> str:
    """Mount a file system for one test; returns its address."""
    root = f"test://{name}"
    monkeypatch.setitem(stores._mounted, root, filesystem)
    monkeypatch.setattr(stores, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(lease_files, "SETTLE_SECONDS", 0.0)
    return root


def in_memory(monkeypatch: pytest.MonkeyPatch, name: str = "b") -> str:
    return mounted(monkeypatch, fs._MockFileSystem(), name)


class Unruly(fs.FileSystemHandler):
    """A folder as a store.

    Attributes:
        before: called with each path that is opened for reading, and may raise or wait.
        opened: how often each path was opened.
        most: reads that went on at the same time, at most.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._inner = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
        self.before: Callable[[str], None] = lambda path: None
        self.opened: Counter[str] = Counter()
        self.seconds = 0.0
        self.most = self._now = 0
        self._lock = threading.Lock()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def get_type_name(self) -> str:
        return "unruly"

    def normalize_path(self, path: str) -> str:
        return path

    def _open(self, path: str) -> None:
        with self._lock:
            self.opened[path] += 1
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            time.sleep(self.seconds)
            self.before(path)
        finally:
            with self._lock:
                self._now -= 1

    def open_input_file(self, path: str) -> Any:
        self._open(path)
        return self._inner.open_input_file(path)

    def open_input_stream(self, path: str) -> Any:
        self._open(path)
        return self._inner.open_input_stream(path, compression=None)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return self._inner.open_output_stream(path)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError

    def get_file_info(self, paths: Any) -> Any:
        return self._inner.get_file_info(list(paths))

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        return self._inner.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._inner.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._inner.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._inner.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        raise NotImplementedError("an object store has no rename")

    def copy_file(self, src: str, dest: str) -> None:
        raise NotImplementedError


def unruly(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str = "u") -> tuple[Unruly, str]:
    """A store over `folder`, and its address."""
    handler = Unruly(folder)
    return handler, mounted(monkeypatch, fs.PyFileSystem(handler), name)
