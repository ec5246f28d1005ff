"""Locations of logs, catalogues and their files: local paths, or addresses of object stores."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn, TypeAlias, TypeVar
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from offtower.atomic import write_bytes
from offtower.data.stores import (
    advice,
    connect,
    first_line,
    has_folders,
    is_address,
    request,
)
from offtower.errors import DataError
from offtower.paths import safe_relative

R = TypeVar("R")

_CUT_SHORT = re.compile(r"^(s3|gs|gcs|abfss?|hdfs|viewfs|file):/[^/]", re.IGNORECASE)
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class ListedFile:
    """A file in the listing of a folder."""

    location: Location
    size: int
    mtime_ns: int | None
    name: str
    """Path relative to the listed folder, with slashes; empty if the file itself was listed."""


class Location:
    """A local path, or an address of an object store.

    Locations are equal if their texts are, and `Location.of(str(location))` opens one again. A
    pickled location connects with the credentials of the process that loads it.

    Attributes:
        local: the local path; None in a store.
        path: the path in its file system.
    """

    __slots__ = ("_address", "_options", "filesystem", "local", "path")

    def __init__(
        self,
        path: str,
        local: Path | None = None,
        filesystem: fs.FileSystem | None = None,
        address: str = "",
        options: str = "",
    ) -> None:
        self.path, self.local, self.filesystem = path, local, filesystem
        self._address, self._options = address, options

    @classmethod
    def of(cls, place: str | Path | Location) -> Location:
        """Parse a path, or an address such as s3://bucket/logs?region=eu-west-1.

        Raises:
            DataError: the address has an unknown form, or its store cannot be reached.
        """
        if isinstance(place, Location):
            return place
        if not is_address(place):
            if _CUT_SHORT.match(str(place)):
                raise DataError(
                    f"'{place}' was an address that Path() has cut short; pass it as text"
                )
            return cls(str(place), local=Path(place))
        text = str(place)
        address, mark, query = text.partition("?")
        if address.lower().startswith("file://"):
            return cls._file(address[7:])
        address = quote(address.rstrip("/"), safe=":/@%=+,;!$&'()*~[]")
        options = mark + query
        connection, path = connect(address + options)
        return cls(path, None, connection.filesystem, address, options)

    @classmethod
    def _file(cls, rest: str) -> Location:
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise DataError(f"'file://{rest}' names no file of this machine; write file:///folder")
        return cls.of(Path("/" + unquote(path)))

    def __str__(self) -> str:
        return str(self.local) if self.local is not None else self._address + self._options

    def __fspath__(self) -> str:
        if self.local is None:
            raise TypeError(f"'{self}' is in a store, and no path of this machine")
        return str(self.local)

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Location) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Location.of, (str(self),)

    def __truediv__(self, name: str) -> Location:
        """Return a file or folder below; `name` may have slashes."""
        if self.local is not None:
            return Location.of(self.local / name)
        path = f"{self.path.rstrip('/')}/{name}" if self.path else name
        address = f"{self._address}/{quote(name, safe='/=+,')}"
        return Location(path, None, self.filesystem, address, self._options)

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    @property
    def parent(self) -> Location:
        if self.local is not None:
            return Location.of(self.local.parent)
        path, address = (text.rpartition("/")[0] for text in (self.path, self._address))
        return Location(path, None, self.filesystem, address, self._options)

    def absolute(self) -> Location:
        """Return the same location for a process with another working folder."""
        return self if self.local is None else Location.of(self.local.resolve())

    def kind(self) -> Literal["file", "folder"] | None:
        """Return whether this is a file, a folder or nothing (None).

        Raises:
            DataError: the store does not answer.
        """
        if self.local is not None:
            return "file" if self.local.is_file() else "folder" if self.local.exists() else None
        info = self._ask(lambda store: store.get_file_info(self.path))
        kinds: dict[Any, Literal["file", "folder"]] = {
            fs.FileType.File: "file",
            fs.FileType.Directory: "folder",
        }
        return kinds.get(info.type)

    def exists(self) -> bool:
        return self.kind() is not None

    def files(self) -> list[ListedFile]:
        """List all files below a folder, or the file itself, sorted by the parts of their paths.

        Raises:
            DataError: the store does not answer, or lists a name outside of the folder.
        """
        if self.local is not None:
            alone = self.local.is_file()
            found = [("", self.path, self.local.stat())] if alone else _files_below(self.local)
            return [
                ListedFile(Location(p, Path(p)), s.st_size, s.st_mtime_ns, n) for n, p, s in found
            ]
        if self.kind() == "file":
            infos = [self._ask(lambda store: store.get_file_info(self.path))]
        else:
            chosen = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
            infos = self._ask(lambda store: store.get_file_info(chosen))
        infos = [info for info in infos if info.type == fs.FileType.File]
        infos.sort(key=lambda info: PurePosixPath(info.path).parts)
        cut = len(self.path)
        named = [(info.path[cut:].lstrip("/"), info) for info in infos]
        return [
            ListedFile(
                self / safe_relative(name, self) if name else self, info.size, info.mtime_ns, name
            )
            for name, info in named
        ]

    def open(self) -> pa.NativeFile:
        """Open a file of a store for random access. Errors are those of pyarrow."""
        assert self.filesystem is not None
        return self.filesystem.open_input_file(self.path)

    def read_bytes(self) -> bytes:
        """Read a small file.

        Raises:
            FileNotFoundError: it does not exist.
            DataError: the store fails.
        """
        if self.local is not None:
            return self.local.read_bytes()

        def read(store: fs.FileSystem) -> bytes:
            with store.open_input_stream(self.path) as stream:
                return bytes(stream.read())

        return self._ask(read)

    def write_bytes(self, content: bytes) -> None:
        """Write a small file atomically."""
        if self.local is not None:
            write_bytes(self.local, content)
        else:
            self._send(lambda sink: sink.write(content))

    def send(self, file: Path) -> None:
        """Upload a local file; the object appears when it is complete.

        Raises:
            DataError: the store fails.
        """

        def copy(sink: pa.NativeFile) -> None:
            with open(file, "rb") as source:
                while block := source.read(_COPY_BYTES):
                    sink.write(block)

        self._send(copy)

    def remove(self) -> None:
        """Remove a file or a folder, if it is there."""
        kind = self.kind()
        if self.local is not None:
            if kind == "file":
                self.local.unlink()
            elif kind == "folder":
                shutil.rmtree(self.local)
            return
        if kind == "file":
            self._ask(lambda store: store.delete_file(self.path))
        elif kind == "folder":
            self._ask(lambda store: store.delete_dir(self.path))

    def refuse(self, error: BaseException, doing: str) -> NoReturn:
        """Raise DataError for an error of the store, with advice."""
        more = advice(error)
        raise DataError(
            f"'{self}' cannot be {doing} ({first_line(error)})" + (f"; {more}" if more else "")
        ) from error

    def _send(self, write: Callable[[pa.NativeFile], Any]) -> None:
        def send(store: fs.FileSystem) -> None:
            if has_folders(store):
                store.create_dir(self.parent.path, recursive=True)
            with store.open_output_stream(self.path) as sink:
                write(sink)

        self._ask(send, "written")

    def _ask(self, function: Callable[[fs.FileSystem], R], doing: str = "read") -> R:
        store = self.filesystem
        assert store is not None
        try:
            return request(lambda: function(store), f"'{self}'")
        except FileNotFoundError as error:
            if doing == "read":
                raise
            self.refuse(error, doing)
        except (pa.ArrowException, OSError) as error:
            self.refuse(error, doing)


def _files_below(folder: Path) -> list[tuple[str, str, os.stat_result]]:
    """Return (relative name, path, stat) of files, sorted by path parts; faster than Path.rglob."""
    found: list[tuple[tuple[str, ...], str, os.stat_result]] = []
    waiting: list[tuple[tuple[str, ...], str]] = [((), str(folder))]
    while waiting:
        parts, place = waiting.pop()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(place) as below:
            for entry in below:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(((*parts, entry.name), entry.path))
                elif entry.is_file():
                    found.append(((*parts, entry.name), entry.path, entry.stat()))
    found.sort(key=lambda one: one[0])
    return [("/".join(parts), place, stat) for parts, place, stat in found]


AnyPath: TypeAlias = str | Path | Location
"""A path or address as public functions take it."""
