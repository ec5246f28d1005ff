"""Identity of a log's content: of its files, whatever they are called and which columns are read.

A file is identified by its size and the checksum of its footer, which a manifest has and a file
shows, and by its sha256 where a manifest has that. Two files are the same where all that is known
of both agrees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offtower.data.location import AnyPath, Location
from offtower.data.manifest import find_parquet_files, read_manifest

if TYPE_CHECKING:
    from offtower.data.parquet import Footer

_DIGITS = 32
"""Hexadecimal digits that are kept of a sha256."""


@dataclass(frozen=True)
class LogContent:
    """Identities of a log's files, sorted: "FOOTER" or "FOOTER.SHA256" each."""

    files: tuple[str, ...]

    @classmethod
    def of(cls, footers: Iterable[Footer]) -> LogContent:
        return cls(tuple(sorted(_identity(footer) for footer in footers)))

    @property
    def fingerprint(self) -> str:
        """Identity of the whole, compared by `is_same`."""
        light = [file.partition(".")[0] for file in self.files]
        full = [file.partition(".")[2] for file in self.files]
        return _digest(light) + (f".{_digest(full)}" if all(full) else "")

    def shared_files(self, other: Sequence[str]) -> int:
        """Number of files that are among the identities of another log's."""
        by_footer: dict[str, list[str]] = {}
        for file in other:
            by_footer.setdefault(file.partition(".")[0], []).append(file)
        return sum(
            any(is_same(file, one) for one in by_footer.get(file.partition(".")[0], ()))
            for file in self.files
        )


def log_content(path: AnyPath) -> LogContent:
    """Content of a log, whose schema need not be known.

    Raises:
        DataError: nothing is there, or a file cannot be read.
    """
    from offtower.data.parquet import listed_footers

    place = Location.of(path)
    found = find_parquet_files(place, "log")
    folder = found[0].location != place
    manifest = read_manifest(place) if folder else None
    return LogContent.of(listed_footers(place, found, manifest))


def is_same(first: str, second: str) -> bool:
    """Whether two identities, of files or of whole logs, agree in all that is known of both."""
    light, _, full = first.partition(".")
    other_light, _, other_full = second.partition(".")
    return light == other_light and (not full or not other_full or full == other_full)


def _identity(footer: Footer) -> str:
    length, crc = footer.tail
    light = _digest([str(footer.size), str(length), str(crc)])
    return light if footer.checksums is None else f"{light}.{footer.checksums.sha256[:_DIGITS]}"


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(",".join(parts).encode()).hexdigest()[:_DIGITS]
