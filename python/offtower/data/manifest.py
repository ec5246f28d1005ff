"""`_offtower.json`: what a directory that offtower wrote says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import offtower
from offtower.atomic import write_text
from offtower.errors import DataError

FILE = "_offtower.json"


def write_manifest(
    directory: Path, schema: dict[str, Any], num_rows: int, fingerprint: str
) -> dict[str, Any]:
    content = {
        "created_by": f"offtower {offtower.__version__}",
        "schema": schema,
        "num_rows": num_rows,
        "fingerprint": fingerprint,
    }
    write_text(directory / FILE, json.dumps(content, indent=2) + "\n")
    return content


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, or None where the directory has none.

    Raises:
        DataError: the file is damaged.
    """
    path = directory / FILE
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["schema"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"'{path}' is damaged: {error}") from error
    return content


def parquet_files(path: Path, what: str) -> list[Path]:
    """Parquet files below a folder, sorted by name; or the file itself.

    Raises:
        DataError: nothing is there, or no Parquet file is.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(f"there is no {what} at '{path}'")
    files = sorted(
        file
        for file in path.rglob("*.parquet")
        if not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    )
    if not files:
        raise DataError(f"the {what} at '{path}' holds no .parquet file")
    return files
