"""How text files write their values: the section `format` of a schema file."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal
from zoneinfo import ZoneInfo

from pydantic import ConfigDict, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from offtower.data.schema import parse_section
from offtower.errors import ConfigError

FileType = Literal["csv", "tsv", "jsonl", "parquet", "arrow"]

ENDINGS: dict[str, FileType] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
"""Compression of a text file by its last ending."""

EPOCH_UNITS = {
    "seconds": 1_000_000,
    "milliseconds": 1_000,
    "microseconds": 1,
    "nanoseconds": 0.001,
}
"""Microseconds of the units that `FileFormat.time` may name."""


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class FileFormat:
    """How files write their values. The defaults are those of RFC 4180 and ISO 8601."""

    type: FileType | None = None
    """csv, tsv, jsonl, parquet or arrow; by default what the file's ending says."""
    delimiter: str | None = None
    """Between the cells of a row; by default a comma, and a tab in TSV."""
    quote: str | None = '"'
    """Around cells that hold delimiters or newlines; doubled inside of such a cell."""
    escape: str | None = None
    """Before a delimiter or quote that belongs to the value."""
    decimal: Literal[".", ","] = "."
    thousands: str | None = None
    """Between groups of three digits."""
    encoding: str = "utf-8"
    null_words: tuple[str, ...] = ("",)
    """Cells without quotes that stand for a missing value, in any column."""
    time: str | None = None
    """Of timestamps: a strptime pattern such as "%d.%m.%Y %H:%M", or seconds, milliseconds,
    microseconds, nanoseconds since 1970. By default ISO 8601, or a number that is kept as it is."""
    zone: str | None = None
    """IANA time zone of times without one, such as Europe/Berlin; the earlier of two times where
    clocks were set back."""
    trim: bool = False
    """Remove spaces around cells and column names."""
    list_separator: str | None = None
    """Between the values of a vector or bag; by default they are JSON lists."""

    @model_validator(mode="after")
    def _check(self) -> FileFormat:
        for name in ("delimiter", "quote", "escape", "thousands"):
            value = getattr(self, name)
            if value is not None and len(value.encode()) != 1:
                if name == "thousands" and len(value) == 1:
                    continue  # A narrow no-break space, for one.
                raise ValueError(f"'{name}' must be one ASCII character or null, got {value!r}")
        if self.thousands is not None and self.thousands == self.decimal:
            raise ValueError(f"'thousands' and 'decimal' are both {self.decimal!r}")
        if self.list_separator == "":
            raise ValueError("'list_separator' must not be empty")
        if self.time is not None and self.time not in EPOCH_UNITS and "%" not in self.time:
            raise ValueError(
                f"'time' must be a pattern such as '%d.%m.%Y %H:%M', or one of "
                f"{', '.join(EPOCH_UNITS)}, got {self.time!r}"
            )
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"unknown encoding {self.encoding!r}") from None
        if self.zone is not None:
            try:
                ZoneInfo(self.zone)
            except (KeyError, ValueError, OSError):
                raise ValueError(f"unknown time zone {self.zone!r}") from None
        return self

    def delimiter_of(self, kind: FileType) -> str:
        """The character between cells in a file of that type."""
        return self.delimiter or ("\t" if kind == "tsv" else ",")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FileFormat:
        return parse_section(_FORMAT, content, "format", cls)


_FORMAT: TypeAdapter[FileFormat] = TypeAdapter(FileFormat)


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class SourceFormats:
    """Formats of the files of a log, its catalogue, its outcomes, and contexts to search for."""

    log: FileFormat = field(default_factory=FileFormat)
    catalogue: FileFormat = field(default_factory=FileFormat)
    outcomes: FileFormat = field(default_factory=FileFormat)
    contexts: FileFormat = field(default_factory=FileFormat)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any] | None) -> SourceFormats:
        """Parse the section `format`: keys for all files, and sections that override them.

        Raises:
            ConfigError: an unknown key or a wrong value.
        """
        if content is None:
            return cls()
        if not isinstance(content, Mapping):
            raise ConfigError(f"format must be keys and values, got {type(content).__name__}")
        shared = {key: value for key, value in content.items() if key not in _SOURCES}
        own = {name: content.get(name) or {} for name in _SOURCES}
        for name, section in own.items():
            if not isinstance(section, Mapping):
                raise ConfigError(
                    f"format.{name} must be keys and values, got {type(section).__name__}"
                )
        return cls(**{name: FileFormat.from_dict({**shared, **own[name]}) for name in _SOURCES})


_SOURCES = ("log", "catalogue", "outcomes", "contexts")
