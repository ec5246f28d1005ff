"""manifest.json of an export: what the files are, which belong together, and their checksums.

    export/CURRENT                  the version that is served
    export/<version>/manifest.json  and all that it names

A new version is written beside and CURRENT is replaced at the end, so that a killed or failed
export leaves the earlier one as it was, and going back is writing one line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from offtower.atomic import sha256_file, write_text
from offtower.errors import RunError

FORMAT = 1
FILE = "manifest.json"
CURRENT = "CURRENT"

Verify = Literal["auto", "full", "size"]

FULL_CHECK_BYTES = 4 << 30
"""`auto` reads every byte of exports up to this size, and compares sizes alone beyond."""


def describe_files(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files below `directory`, by their relative names."""
    return {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
        for name in sorted(names)
    }


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write manifest.json, with the checksum of its own content."""
    body = {"format": FORMAT, **content}
    body["manifest_sha256"] = _digest(body)
    write_text(directory / FILE, json.dumps(body, indent=2, sort_keys=True) + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of one version.

    Raises:
        RunError: it is missing, damaged, or of another format.
    """
    path = directory / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stored = content.pop("manifest_sha256")
        found = content["format"]
    except FileNotFoundError:
        raise RunError(
            f"no export at '{directory}': {FILE} is missing. Make one with: offtower export RUN"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"'{path}' is damaged ({error}); export again") from error
    if found != FORMAT:
        raise RunError(f"'{path}' has format {found}, this offtower reads {FORMAT}; export again")
    if _digest(content) != stored:
        raise RunError(f"'{path}' was changed after it was written; export again")
    return dict(content)


def verify_files(directory: Path, manifest: dict[str, Any], verify: Verify = "auto") -> None:
    """Compare the files with the manifest.

    Args:
        verify: "size" compares sizes, "full" checksums too; "auto" is full for exports of up to
            FULL_CHECK_BYTES.

    Raises:
        RunError: a file is missing, has another size, or another content.
    """
    files = manifest["files"]
    total = sum(facts["bytes"] for facts in files.values())
    full = verify == "full" or (verify == "auto" and total <= FULL_CHECK_BYTES)
    for name, facts in files.items():
        path = directory / name
        if not path.is_file():
            raise RunError(f"the export at '{directory}' lacks '{name}'; export again")
        size = path.stat().st_size
        if size != facts["bytes"]:
            what = "truncated" if size < facts["bytes"] else "changed"
            raise RunError(
                f"'{path}' is {what}: it has {size:,} bytes, the manifest says "
                f"{facts['bytes']:,}; export again"
            )
        if full and sha256_file(path) != facts["sha256"]:
            raise RunError(
                f"'{path}' is corrupted: its sha256 is not the manifest's; export again, or copy "
                "the file again"
            )


def set_current(export: Path, version: str) -> None:
    """Serve `version` from now on."""
    write_text(export / CURRENT, version + "\n")


def current_version(export: Path) -> Path:
    """The folder of the version that CURRENT names.

    Raises:
        RunError: there is no export, or the version is gone.
    """
    path = export / CURRENT
    try:
        version = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise RunError(
            f"no finished export at '{export}'. Make one with: offtower export RUN"
        ) from None
    if not version or "/" in version or not (export / version).is_dir():
        raise RunError(f"'{path}' names version '{version}', which is not there; export again")
    return export / version


def find_version(path: str | Path) -> Path:
    """The version folder behind a run directory, an export folder, or the folder itself."""
    path = Path(path)
    if (path / FILE).exists() and not (path / "config.yaml").exists():
        return path
    if (path / CURRENT).exists():
        return current_version(path)
    return current_version(path / "export")


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
