"""Atomic replacement of files and folders."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; at the end the file is flushed and renamed to `path`.

    If the block fails, the old file stays and the new one is removed.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def replace_directory(directory: Path) -> Iterator[Path]:
    """Yield a new folder beside `directory`; at the end it is flushed and renamed to `directory`.

    If the block fails, an old folder of that name stays and the new one is removed.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(directory)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = None
    if directory.exists():
        old = _beside(directory)
        os.replace(directory, old)
    os.replace(temporary, directory)
    sync_directory(directory.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Flush every file below a folder to disk."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _flush(path)
    sync_directory(directory)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Flush renames inside `directory` to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # Some file systems refuse fsync on folders; the rename itself is still atomic.
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")


def remove_leftovers(directory: Path) -> None:
    """Remove temporary files of killed writers."""
    for path in directory.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
