"""manifest.json of an export: what the files are, which belong together, and their checksums.

    export/CURRENT                  the version that is served
    export/<version>/manifest.json  and all that it names

A new version is written beside and CURRENT is replaced at the end, so that a killed or failed
export leaves the earlier one as it was, and going back is writing one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from offtower.atomic import write_text
from offtower.checksums import read_checked_json, verify_file, write_checked_json
from offtower.errors import RunError
from offtower.paths import safe_relative

FORMAT = 1
FILE = "manifest.json"
CURRENT = "CURRENT"

Verify = Literal["auto", "full", "size"]

FULL_CHECK_BYTES = 4 << 30
"""`auto` reads every byte of exports up to this size, and compares sizes alone beyond."""


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write manifest.json, with the checksum of its own content."""
    write_checked_json(directory / FILE, {"format": FORMAT, **content})


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of one version.

    Raises:
        RunError: it is missing, damaged, or of another format.
    """
    path = directory / FILE
    try:
        content = read_checked_json(path)
    except FileNotFoundError:
        raise RunError(
            f"no export at '{directory}': {FILE} is missing. Make one with: offtower export RUN"
        ) from None
    found = content.get("format")
    if found != FORMAT:
        raise RunError(f"'{path}' has format {found}, this offtower reads {FORMAT}; export again")
    return content


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
        path = directory / safe_relative(name, directory / FILE, RunError)
        fault = verify_file(path, facts, size_only=not full)
        if fault:
            raise RunError(f"{fault}; export again, or copy the file again")


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
