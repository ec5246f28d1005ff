"""`_offtower.json`, the manifest of a log or catalogue that offtower wrote."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import offtower
from offtower.checksums import add_checksum, check_json, parse_json
from offtower.data.location import AnyPath, ListedFile, Location
from offtower.errors import DataError
from offtower.paths import safe_relative

FILE = "_offtower.json"
WRITING = "_writing.json"
"""Marker in stores while a folder is written; removed after the manifest is written."""


def write_manifest(
    directory: Location,
    schema: dict[str, Any],
    num_rows: int,
    fingerprint: str,
    files: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write the manifest with a checksum; returns it without files and checksum.

    Args:
        files: `Footer.to_dict` of each file, to open the folder without reading footers, and to
            verify the files.
    """
    content = {
        "created_by": f"offtower {offtower.__version__}",
        "schema": schema,
        "num_rows": num_rows,
        "fingerprint": fingerprint,
    }
    whole = add_checksum(content if files is None else {**content, "files": files})
    listed = whole.pop("files", None)
    text = json.dumps(whole, indent=2)
    if listed is not None:
        # One line per file, since a log may have thousands.
        lines = ",\n".join(f"    {json.dumps(file)}" for file in listed)
        text = f'{text[:-2]},\n  "files": [\n{lines}\n  ]\n}}'
    (directory / FILE).write_bytes((text + "\n").encode())
    return content


def read_manifest(directory: AnyPath) -> dict[str, Any] | None:
    """Read the manifest; None if the directory has none.

    Raises:
        DataError: the file is damaged.
    """
    path = Location.of(directory) / FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    manifest = check_json(parse_json(content, path, DataError), path, DataError)
    if "schema" not in manifest:
        raise DataError(f"'{path}' is damaged: it has no schema")
    for file in manifest.get("files", ()):
        safe_relative(file["name"], path)
    return manifest


def is_unfinished(names: Collection[str]) -> bool:
    """Whether a folder with these files is still being written, or its writer died."""
    return WRITING in names and FILE not in names


def find_parquet_files(path: AnyPath, what: str) -> list[ListedFile]:
    """List the Parquet files below a folder, sorted by name; or the file itself.

    Raises:
        DataError: there is none, or the folder is unfinished.
    """
    place = Location.of(path)
    listed = place.files()
    if len(listed) == 1 and listed[0].location == place:
        return listed
    if not listed and not place.exists():
        hint = "" if place.local is not None else "; check the bucket's name and the prefix"
        raise DataError(f"there is no {what} at '{place}'{hint}")
    below = [(found.name.split("/"), found) for found in listed]
    if is_unfinished([found.name for found in listed]):
        raise DataError(
            f"the {what} at '{place}' is incomplete: it is being written, or its writer died "
            f"('{WRITING}' is there and '{FILE}' is not). Wait for it, or remove the folder and "
            "write it again"
        )
    files = [
        found
        for parts, found in below
        if parts[-1].endswith(".parquet") and not any(p.startswith((".", "_")) for p in parts)
    ]
    if not files:
        raise DataError(f"the {what} at '{place}' holds no .parquet file")
    return files
