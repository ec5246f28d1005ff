"""Versions of an export: manifest.json with checksums of all files, and the current version.

    export/CURRENT                  name of the version that is served
    export/<version>/manifest.json  description and checksums of its files

A version is written to a temporary folder and renamed, and CURRENT is replaced last. A killed or
failed export therefore leaves the earlier version in place. To roll back, write its name to
CURRENT.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from offtower.atomic import write_text
from offtower.checksums import read_checked_json, verify_file, write_checked_json
from offtower.config import ServingConfig
from offtower.config.serving import parse_serving
from offtower.errors import RunError
from offtower.paths import safe_relative

FORMAT = 3
_READ_FORMATS = (2, FORMAT)
"""Format 2 has the vectors in one file."""
FILE = "manifest.json"
CURRENT = "CURRENT"

Verify = Literal["auto", "full", "size"]

FULL_CHECK_BYTES = 4 << 30
"""`auto` compares checksums of exports up to this size, and only sizes beyond."""


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write manifest.json with the checksum of its own content."""
    write_checked_json(directory / FILE, {"format": FORMAT, **content})


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of one version.

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
    if found not in _READ_FORMATS:
        raise RunError(f"'{path}' has format {found}, this offtower reads {FORMAT}; export again")
    return content


def verify_files(directory: Path, manifest: dict[str, Any], verify: Verify = "auto") -> None:
    """Compare the files of a version with its manifest.

    Args:
        verify: "size" compares sizes, "full" checksums too; "auto" is full for exports of up to
            FULL_CHECK_BYTES.

    Raises:
        RunError: a file is missing or differs, or its name leaves the folder.
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
    """Make `version` the one that is served."""
    write_text(export / CURRENT, version + "\n")


def current_version(export: Path) -> Path:
    """Return the folder of the version that CURRENT names.

    Raises:
        RunError: there is no export, or CURRENT is damaged or names a missing version.
    """
    path, version = export / CURRENT, None
    while True:
        try:
            found = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise RunError(
                f"no finished export at '{export}'. Make one with: offtower export RUN"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"'{path}' is damaged: {error}; export again") from error
        if "/" not in safe_relative(found, path, RunError) and (export / found).is_dir():
            return export / found
        # Another export may have replaced CURRENT and removed this version in between.
        if found == version:
            raise RunError(f"'{path}' names version '{found}', which is missing; export again")
        version = found


def earlier_version(runs: Iterable[Path]) -> Path | None:
    """Return the current version of the first of several runs that has one."""
    for run in runs:
        try:
            return current_version(run / "export")
        except RunError:
            continue
    return None


def find_version(path: str | Path) -> Path:
    """Return the version folder of a run directory, an export folder, or a version folder."""
    path = Path(path)
    if (path / FILE).exists() and not (path / "config.yaml").exists():
        return path
    if (path / CURRENT).exists():
        return current_version(path)
    return current_version(path / "export")


def prune_versions(export: Path, *, kept: int, keep_seconds: float) -> None:
    """Remove old versions that are no longer in use.

    The current version and the `kept` newest ones stay, and so does each version that was replaced
    by a newer one less than `keep_seconds` ago: a reader may still be opening its files.
    """
    current = current_version(export)
    # Ages are differences of the file system's own time stamps.
    finished = {
        path.parent: path.stat().st_mtime
        for path in export.glob(f"*/{FILE}")
        if not path.parent.name.startswith(".") and _is_version(path.parent)
    }
    versions = sorted(finished, key=lambda path: (finished[path], path.name))
    now = (export / CURRENT).stat().st_mtime
    for old, newer in itertools.pairwise(versions[: max(0, len(versions) + 1 - kept)]):
        if old != current and now - finished[newer] >= keep_seconds:
            # Renamed first: a version is there as a whole or not at all.
            removed = old.with_name(f".{old.name}.partial")
            old.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def _is_version(directory: Path) -> bool:
    """Whether it was written by an export: other folders with a manifest.json are left alone."""
    try:
        read_manifest(directory)
    except (OSError, RunError):
        return False
    return True


def logged_name(version: str, exported: ServingConfig, serving: ServingConfig) -> str:
    """Name under which an export logs what it serves.

    exported: how the export says it is served. serving: how it is.
    """
    name = f"export {version}"
    return name if serving == exported else f"{name} with {serving.text}"


def logged_names(export: Path, weights_sha256: str, serving: ServingConfig) -> list[str]:
    """Names in logs that the versions of a policy wrote which were served in this way.

    Args:
        export: folder of the versions; there may be none. weights_sha256: of the policy.
    """
    found = []
    for path in sorted(export.glob(f"*/{FILE}")):
        if path.parent.name.startswith("."):
            continue
        manifest = read_manifest(path.parent)
        if manifest["policy"]["weights_sha256"] == weights_sha256:
            exported = parse_serving(manifest["serving"], str(path))
            found.append(logged_name(manifest["version"], exported, serving))
    return found
