"""JSON files that carry a checksum of their content, and folders with checksums of their files.

A checked JSON file has a key "sha256": the digest of all other keys in canonical form. A checked
folder has a `checksums.json`, itself checked, with the size and sha256 of every other file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offtower.atomic import replace_directory, sha256_file, write_text
from offtower.errors import OfftowerError, RunError
from offtower.paths import safe_relative

FILE = "checksums.json"
_KEY = "sha256"
_LINE = "# sha256: "


def read_json(path: Path, error: type[OfftowerError] = RunError) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: it is missing.
        OfftowerError: it is not readable UTF-8 or JSON, or not an object; of the type `error`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as failure:
        raise error(f"'{path}' cannot be read: {failure}") from failure
    return parse_json(content, path, error)


def parse_json(
    content: bytes, name: object, error: type[OfftowerError] = RunError
) -> dict[str, Any]:
    """As `read_json`, of bytes; `name` is the file in error messages."""
    try:
        parsed = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as failure:  # UnicodeDecodeError is a ValueError.
        raise error(f"'{name}' is damaged: {failure}") from failure
    if not isinstance(parsed, dict):
        raise error(f"'{name}' is damaged: it holds a {type(parsed).__name__}, not an object")
    return parsed


def add_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as JSON stores it, with its checksum as the last key."""
    stored: dict[str, Any] = json.loads(json.dumps(content))
    stored.pop(_KEY, None)
    return {**stored, _KEY: _digest(stored)}


def write_checked_json(path: Path, content: Mapping[str, Any]) -> str:
    """Write a JSON object with its checksum, which is returned."""
    stored = add_checksum(content)
    write_text(path, json.dumps(stored, indent=2) + "\n")
    return str(stored[_KEY])


def read_checked_json(path: Path, error: type[OfftowerError] = RunError) -> dict[str, Any]:
    """Read what `write_checked_json` wrote, without the checksum.

    Raises:
        FileNotFoundError: it is missing.
        OfftowerError: it is damaged, or has no checksum or another; of the type `error`.
    """
    return check_json(read_json(path, error), path, error)


def check_json(
    content: dict[str, Any], name: object, error: type[OfftowerError] = RunError
) -> dict[str, Any]:
    """Compare a parsed object with its checksum, and return it without the checksum."""
    stored = content.pop(_KEY, None)
    if stored is None:
        raise error(
            f"'{name}' has no checksum ('{_KEY}'): it is damaged, or was written by an offtower "
            "older than checksums; write it again"
        )
    if stored != _digest(content):
        raise error(
            f"'{name}' is damaged or was changed after it was written: its content does not match "
            "its checksum; restore it from a copy, or write it again"
        )
    return content


def checked_text(text: str) -> str:
    """Text below a comment line (`# ...`) with its checksum."""
    return f"{_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def is_checked_text(text: str) -> bool:
    """Whether text has a checksum in its first line."""
    return text.startswith(_LINE[:4])


def check_text(text: str, name: object, error: type[OfftowerError] = RunError) -> None:
    """Compare text with the checksum in its first line; text without such a line passes."""
    if not is_checked_text(text):
        return
    line, _, rest = text.partition("\n")
    if line != _LINE + hashlib.sha256(rest.encode()).hexdigest():
        raise error(
            f"'{name}' is damaged or was changed after it was written: its content does not match "
            "the checksum in its first line. Restore it from a copy; if you edited it, remove "
            "that line"
        )


def describe_files(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files below `directory`, by their relative names."""
    return {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
        for name in sorted(names)
    }


def verify_file(path: Path, facts: Mapping[str, Any], *, size_only: bool = False) -> str:
    """Compare a file with what `describe_files` gave.

    Returns:
        What is wrong with it; empty where nothing is.
    """
    if not path.is_file():
        return f"'{path}' is missing"
    size = path.stat().st_size
    if size != facts["bytes"]:
        what = "truncated" if size < facts["bytes"] else "changed"
        return f"'{path}' is {what}: it has {size:,} bytes, not {facts['bytes']:,}"
    if not size_only and sha256_file(path) != facts["sha256"]:
        return f"'{path}' is corrupted: its sha256 is not the one recorded when it was written"
    return ""


def write_checksums(directory: Path) -> str:
    """Write `checksums.json` of all files below a folder; returns the checksum of that file."""
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    names = (path.as_posix() for path in paths)
    files = describe_files(directory, (name for name in names if name != FILE))
    return write_checked_json(directory / FILE, {"files": files})


def is_complete(directory: Path) -> bool:
    """Whether a checked folder is there with its `checksums.json`, the last file to be written or
    copied."""
    return (directory / FILE).is_file()


def verify_directory(directory: Path, remedy: str) -> None:
    """Compare all files of a folder with its `checksums.json`.

    Args:
        remedy: what to do about damage, for the error message.

    Raises:
        RunError: a file is missing or damaged.
    """
    try:
        files = read_checked_json(directory / FILE)["files"]
        names = {safe_relative(name, directory / FILE, RunError): files[name] for name in files}
        faults = (verify_file(directory / name, facts) for name, facts in names.items())
        fault = next(filter(None, faults), "")
    except FileNotFoundError:
        raise RunError(f"'{directory}' has no {FILE}; {remedy}") from None
    except (KeyError, TypeError) as error:
        raise RunError(f"'{directory / FILE}' lacks or garbles {error}; {remedy}") from error
    if fault:
        raise RunError(f"{fault}; {remedy}")


@contextmanager
def checked_directory(directory: Path) -> Iterator[Path]:
    """As `atomic.replace_directory`, with the checksums of what was written."""
    with replace_directory(directory) as temporary:
        yield temporary
        write_checksums(temporary)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
